"""Causal tracing: which states, once restored in a corrupted run, bring the fact back (Meng et al. 2022, section 2).

The published protocol (appendix B.1 and the authors' code): ten rows whose subject is corrupted by Gaussian noise on
its token embeddings, sigma three times the standard deviation of the embeddings of all subjects in the fact list, one
seed for all facts; one state (token, layer) at a time is set back to what it was in the clean run; the score is the mean probability
of the clean run's top-1 token. The residual stream is restored at one layer, MLP and attention outputs in a window of layers.

What is computed is exactly that, at a fraction of the passes. Attention is causal and blocks come one after another, so a
restoration at (token, layer) leaves every earlier token and every lower layer as the corrupted run has them: these are
remembered as keys, values and residual streams, and the pass starts at the restored token and layer. Restorations that start
at the same layer run together, each as ten rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import Replace, patch, patch_embedding, record
from guardedit.models.suffix import Suffix, past_of

KINDS = ("residual", "mlp", "attention")
"""What is restored: the residual stream behind a block, or what its MLP or its attention puts out."""
_WINDOWED = {"mlp": "hook_mlp_out", "attention": "hook_attn_out"}
PUBLISHED_WINDOW, PUBLISHED_DEPTH = 10, 28
"""Window of layers, and the depth of the shallowest model that it was published for (GPT-J)."""

Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1."""


@dataclass(frozen=True)
class Fact:
    """A fact to trace."""

    subject: str
    prompt: str
    """A stem with exactly one `{}` where the subject goes."""
    answer: str | None = None
    """What the model is expected to say; None takes whatever it says."""

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1 or not self.subject.strip():
            raise BadRequestError(
                f"a fact to trace needs a subject and a prompt with one `{{}}`, got {self.subject!r} and {self.prompt!r}"
            )

    @property
    def filled(self) -> str:
        """The prompt with its subject in place."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class TraceSettings:
    """The published protocol; anything else is a choice that the result names."""

    kinds: tuple[str, ...] = KINDS
    samples: int = 10
    """Corrupted rows."""
    noise_factor: float = 3.0
    """Sigma of the noise, in standard deviations of the subjects' embeddings."""
    window: int | None = None
    """Layers restored together for MLP and attention; None: see `window_of`."""
    every: int = 1
    """Trace every n-th layer only, n // 2 first; each value is the protocol's, there are fewer of them."""
    seed: int = 1
    """Of the noise; the same for every fact."""
    batch_tokens: int = 128
    """Tokens that a pass should have at least; does not change what is computed."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise BadRequestError(f"kinds {unknown or 'none'}: choose from {', '.join(KINDS)}")
        for name in ("samples", "every", "batch_tokens", *(("window",) if self.window is not None else ())):
            if getattr(self, name) < 1:
                raise BadRequestError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.noise_factor >= 0:
            raise BadRequestError(f"noise_factor is {self.noise_factor}; it must be 0 or more")


@dataclass(frozen=True, eq=False)
class Trace:
    """One traced fact."""

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    """First token of the subject, and the one after its last."""
    answer: str
    """The clean run's top-1 token: the answer, or its first token."""
    p_clean: float
    p_corrupted: float
    layers: tuple[int, ...]
    scores: Mapping[str, Float[Tensor, "tokens layers"]]
    """By kind: mean probability of the answer with that state restored."""

    @property
    def total_effect(self) -> float:
        """What the corruption takes: TE = p_clean − p_corrupted."""
        return self.p_clean - self.p_corrupted

    def indirect(self, kind: str) -> Float[Tensor, "tokens layers"]:
        """What each restored state gives back: IE = p_restored − p_corrupted."""
        return self.scores[kind] - self.p_corrupted


def window_of(n_layers: int) -> int:
    """Ten layers, as published for models of 28 to 48; in proportion fewer for a shallower model, at least one."""
    return max(1, min(PUBLISHED_WINDOW, round(PUBLISHED_WINDOW * n_layers / PUBLISHED_DEPTH)))


def window_at(layer: int, window: int, n_layers: int) -> range:
    """Layers restored together around `layer`: as many below as from it on (one more from it on if odd), clipped."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


def embedding_std(handle: ModelHandle, subjects: Sequence[str]) -> float:
    """Standard deviation over all entries of the token embeddings of `subjects`, each tokenised by itself."""
    if not subjects:
        raise BadRequestError("no subjects to take the noise level from")
    module = handle.model.get_submodule(handle.architecture.embedding)
    with torch.no_grad():
        found = [module(handle.encode([subject])["input_ids"])[0] for subject in subjects]
    return float(torch.cat(found).float().std())


def trace(
    handle: ModelHandle,
    fact: Fact,
    embedding_std: float,
    settings: TraceSettings | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Trace one fact; the model is left as it was.

    `embedding_std` is that of the fact list's subjects. Raises BadRequestError where the model's top-1 token is not the
    expected answer's first, and for a subject that no token covers.
    """
    settings = settings or TraceSettings()
    layers = tuple(range(settings.every // 2, handle.n_layers, settings.every))
    with preserved(handle), torch.no_grad():
        runs = _runs(handle, fact, settings.noise_factor * embedding_std, settings)
        n_tokens, first = runs.input_ids.shape[1], runs.subject[0]
        p_corrupted = float(runs.corrupted.mean())
        # Tokens before the subject are clean in every row: there is nothing to restore.
        shape = (n_tokens, len(layers))
        scores = {
            kind: torch.full(shape, p_corrupted, dtype=torch.float64, device=handle.device)
            for kind in settings.kinds
        }
        work = _restorations(handle.n_layers, layers, settings)
        for done, token in enumerate(range(first, n_tokens)):
            for group in _groups(work, settings.samples * (n_tokens - token), settings.batch_tokens):
                for restoration, value in zip(group, _restored(runs, token, group), strict=True):
                    scores[restoration.kind][token, restoration.column] = value
            if progress is not None:
                progress((done + 1) / (n_tokens - first))
    tokenizer = handle.tokenizer
    return Trace(
        tokens=tuple(tokenizer.decode([token]) for token in runs.input_ids[0].tolist()),
        subject=runs.subject,
        answer=tokenizer.decode([runs.answer]),
        p_clean=runs.p_clean,
        p_corrupted=p_corrupted,
        layers=layers,
        scores={kind: table.cpu() for kind, table in scores.items()},
    )


def top_tokens(handle: ModelHandle, fact: Fact) -> tuple[int, int | None]:
    """The model's top-1 token after the prompt, and the first token of the expected answer (None without one)."""
    ids = handle.encode([fact.filled])["input_ids"]
    with torch.no_grad(), preserved(handle):
        hidden = handle.hidden(ids, torch.ones_like(ids))
        top = int(_last_logits(handle, hidden)[0].argmax())
    return top, _expected(handle, fact, ids)


def noise(settings: TraceSettings, n_tokens: int, width: int) -> Float[np.ndarray, "samples tokens width"]:
    """Standard normal noise for a subject of `n_tokens`, the same for every fact of that length, as published."""
    # The legacy generator on purpose: it is the one whose numbers the published protocol draws.
    return np.random.RandomState(settings.seed).randn(settings.samples, n_tokens, width)


@dataclass(frozen=True, eq=False)
class _Runs:
    """The clean run and the corrupted one, with everything that restorations start from."""

    handle: ModelHandle
    input_ids: Int[Tensor, "1 seq"]
    subject: tuple[int, int]
    answer: int
    p_clean: float
    clean: Mapping[str, Float[Tensor, "seq d_model"]]
    """Hook name -> states of the clean run."""
    corrupted: Float[Tensor, " samples"]
    """Probability of the answer in each corrupted row."""
    streams: Sequence[Float[Tensor, "samples seq d_model"]]
    """Input of each block in the corrupted run."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of the corrupted run, by layer."""


def _runs(handle: ModelHandle, fact: Fact, sigma: float, settings: TraceSettings) -> _Runs:
    encoded = handle.encode([fact.filled])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    subject = subject_tokens(fact, encoded["offsets"][0])
    inputs = [f"blocks.{layer}.hook_resid_pre" for layer in range(handle.n_layers)]
    with record(handle, [*inputs, *_output_hooks(handle.n_layers)]) as clean:
        hidden = handle.hidden(ids, mask)
    answer = _answer(handle, fact, ids, hidden)
    rows = (ids.expand(settings.samples, -1), mask.expand(settings.samples, -1))
    with patch_embedding(handle, _corruption(subject, sigma, settings)):
        with record(handle, inputs) as streams:
            hidden_corrupted = handle.hidden(*rows)
        past = past_of(handle, *rows)
    return _Runs(
        handle=handle,
        input_ids=ids,
        subject=subject,
        answer=answer,
        p_clean=float(_p_answer(handle, hidden, answer)[0]),
        clean={name: states[0] for name, states in clean.items()},
        corrupted=_p_answer(handle, hidden_corrupted, answer),
        streams=[streams[name] for name in inputs],
        past=past,
    )


def subject_tokens(fact: Fact, offsets: Int[Tensor, "seq 2"]) -> tuple[int, int]:
    """First token that overlaps the subject, and the one after the last; raises BadRequestError where none does."""
    start = fact.prompt.index("{}")
    end = start + len(fact.subject)
    where = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero().flatten()
    if not len(where):
        raise BadRequestError(f"no token covers the subject {fact.subject!r} in {fact.filled!r}")
    return int(where[0]), int(where[-1]) + 1


def _output_hooks(n_layers: int) -> list[str]:
    outputs = [f"blocks.{layer}.{point}" for point in _WINDOWED.values() for layer in range(n_layers)]
    return [*outputs, f"blocks.{n_layers - 1}.hook_resid_post"]


def _answer(handle: ModelHandle, fact: Fact, ids: Tensor, hidden: Tensor) -> int:
    """Token id of the clean run's answer, which must be the expected one."""
    top = int(_last_logits(handle, hidden)[0].argmax())
    expected = _expected(handle, fact, ids)
    if expected not in (None, top):
        raise BadRequestError(
            f"after {fact.filled!r} the model says {handle.tokenizer.decode([top])!r}, not {fact.answer!r}; "
            "only facts that the model knows are traced"
        )
    return top


def _expected(handle: ModelHandle, fact: Fact, ids: Tensor) -> int | None:
    """First token id of the expected answer behind the prompt."""
    if fact.answer is None:
        return None
    pair, length = handle.encode_pairs([fact.filled], [fact.answer]), ids.shape[1]
    if not torch.equal(pair["input_ids"][:, :length], ids) or not bool(pair["target_mask"][0, length]):
        raise BadRequestError(
            f"{fact.answer!r} changes how {fact.filled!r} is tokenised; end the prompt at a whole token"
        )
    return int(pair["input_ids"][0, length])


def _corruption(subject: tuple[int, int], sigma: float, settings: TraceSettings) -> Replace:
    first, end = subject

    def corrupt(embedded: Tensor) -> Tensor:
        drawn = torch.from_numpy(noise(settings, end - first, embedded.shape[-1]))
        moved = embedded.clone()
        moved[:, first:end] += (sigma * drawn).to(embedded)
        return moved

    return corrupt


def _last_logits(handle: ModelHandle, hidden: Float[Tensor, "rows seq d_model"]) -> Float[Tensor, "rows vocab"]:
    last = hidden[:, -1:]
    return handle.logits_at(last, torch.ones(last.shape[:2], dtype=torch.bool, device=last.device)).float()


def _p_answer(handle: ModelHandle, hidden: Tensor, answer: int) -> Float[Tensor, " rows"]:
    """Probability of the answer at each row's last position, float64."""
    logits = _last_logits(handle, hidden)
    return (logits[:, answer] - logits.logsumexp(-1)).double().exp()


@dataclass(frozen=True)
class _Restoration:
    """One cell of the table, whatever the token."""

    kind: str
    column: int
    start: int
    """The first block that has to be run."""
    hook_names: tuple[str, ...]


def _restorations(
    n_layers: int, layers: Sequence[int], settings: TraceSettings
) -> tuple[_Restoration, ...]:
    """Every kind and layer, by the block they start at."""
    window = settings.window or window_of(n_layers)
    found = []
    for kind in settings.kinds:
        for column, layer in enumerate(layers):
            if kind in _WINDOWED:
                span = window_at(layer, window, n_layers)
                names = tuple(f"blocks.{at}.{_WINDOWED[kind]}" for at in span)
                found.append(_Restoration(kind, column, span[0], names))
            elif layer + 1 < n_layers:
                # Behind one block is before the next: the block itself need not be run.
                found.append(_Restoration(kind, column, layer + 1, (f"blocks.{layer + 1}.hook_resid_pre",)))
            else:
                found.append(_Restoration(kind, column, layer, (f"blocks.{layer}.hook_resid_post",)))
    return tuple(sorted(found, key=lambda restoration: restoration.start))


def _groups(
    work: Sequence[_Restoration], tokens_each: int, batch_tokens: int
) -> Iterator[list[_Restoration]]:
    """Consecutive restorations that run as one batch: those of one start, and of the next ones while they are few.

    A later start than the group's first means blocks that are run for nothing, so groups end as soon as they fill a pass.
    """
    group: list[_Restoration] = []
    for restoration in work:
        full = len(group) * tokens_each >= batch_tokens
        if group and full and restoration.start != group[-1].start:
            yield group
            group = []
        group.append(restoration)
    if group:
        yield group


def _restored(runs: _Runs, token: int, group: Sequence[_Restoration]) -> list[float]:
    """Mean probability of the answer with each restoration of the group made at `token`."""
    handle, start, copies = runs.handle, group[0].start, len(group)
    samples = len(runs.corrupted)
    members: dict[str, list[int]] = {}
    for at, restoration in enumerate(group):
        for name in restoration.hook_names:
            members.setdefault(name, []).append(at)
    fixes = {name: _fix(rows, samples, runs.clean[name][token]) for name, rows in members.items()}
    stream = runs.streams[start][:, token:].repeat(copies, 1, 1)
    # `resume` puts the stream in place whatever came before, so what is restored right there goes in by hand.
    here = fixes.pop(f"blocks.{start}.hook_resid_pre", None)
    suffix = _suffix(runs, token, start, copies, here(stream) if here else stream)
    with ExitStack() as stack:
        for name, fix in fixes.items():
            stack.enter_context(patch(handle, name, fix))
        hidden = suffix.hidden()
    means: list[float] = _p_answer(handle, hidden, runs.answer).view(copies, samples).mean(1).tolist()
    return means


def _fix(members: Sequence[int], samples: int, clean: Float[Tensor, " d_model"]) -> Replace:
    """Sets the first position of the members' rows to the clean state."""
    rows = [at * samples + sample for at in members for sample in range(samples)]

    def fix(activation: Tensor) -> Tensor:
        fixed = activation.clone()
        fixed[rows, 0] = clean
        return fixed

    return fix


def _suffix(runs: _Runs, token: int, start: int, copies: int, stream: Tensor) -> Suffix:
    """The corrupted rows from `token` on, once a restoration, resumed at block `start` with `stream`."""
    rows, ids = len(stream), runs.input_ids
    # Layers below the start are skipped: theirs only have to say how long the past is.
    past = tuple(
        (keys[:, :, :token], values[:, :, :token])
        if layer < start
        else (keys[:, :, :token].repeat(copies, 1, 1, 1), values[:, :, :token].repeat(copies, 1, 1, 1))
        for layer, (keys, values) in enumerate(runs.past)
    )
    tail = ids[:, token:].expand(rows, -1)
    return Suffix(
        handle=runs.handle,
        layer=start,
        input_ids=tail,
        mask=torch.ones_like(tail, dtype=torch.bool),
        full_mask=torch.ones_like(ids).expand(rows, -1),
        position_ids=torch.arange(token, ids.shape[1], device=ids.device).expand(rows, -1),
        past=past if token else (),
        resid_pre=stream,
    )
