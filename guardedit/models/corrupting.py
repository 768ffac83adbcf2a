"""The two runs that causal tracing compares: the clean one, and the one with a corrupted subject (Meng et al. 2022).

Ten rows whose subject is hidden by Gaussian noise on its token embeddings; sigma is three times the standard deviation
of the embeddings of all subjects in the fact list, and one seed serves all facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import Replace, patch_embedding, record
from guardedit.models.installed import edits_of
from guardedit.models.suffix import past_of

KINDS = ("residual", "mlp", "attention")
"""What is restored: the residual stream behind a block, or what its MLP or its attention puts out."""
_ROWS = 8


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
                f"a fact needs a subject and a prompt with one `{{}}`, got {self.subject!r} and {self.prompt!r}"
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
    batch_tokens: int = 1024
    """Tokens that a pass holds at most; does not change what is computed."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise BadRequestError(f"kinds {unknown or 'none'}: choose from {', '.join(KINDS)}")
        for name in ("samples", "every", "batch_tokens", *(("window",) if self.window is not None else ())):
            if getattr(self, name) < 1:
                raise BadRequestError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.noise_factor >= 0:
            raise BadRequestError(f"noise_factor is {self.noise_factor}; it must be 0 or more")


def embedding_std(handle: ModelHandle, subjects: Sequence[str]) -> float:
    """Standard deviation over all entries of the token embeddings of `subjects`, each tokenised by itself."""
    if not subjects:
        raise BadRequestError("no subjects to take the noise level from")
    module = handle.model.get_submodule(handle.architecture.embedding)
    with torch.no_grad():
        found = [module(handle.encode([subject])["input_ids"])[0] for subject in subjects]
    return float(torch.cat(found).float().std())


def noise(settings: TraceSettings, n_tokens: int, width: int) -> Float[np.ndarray, "samples tokens width"]:
    """Standard normal noise for a subject of `n_tokens`, the same for every fact of that length, as published."""
    # The legacy generator on purpose: it is the one whose numbers the published protocol draws.
    return np.random.RandomState(settings.seed).randn(settings.samples, n_tokens, width)


@dataclass(frozen=True, eq=False)
class Runs:
    """The clean run and the corrupted one, with everything that restorations start from."""

    handle: ModelHandle
    input_ids: Int[Tensor, "1 seq"]
    subject: tuple[int, int]
    answer: int
    p_clean: float
    corrupted: Float[Tensor, " samples"]
    """Probability of the answer in each corrupted row."""
    streams: Sequence[Float[Tensor, "samples seq d_model"]]
    """Input of each block in the corrupted run."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of the corrupted run, by layer; none for a family whose earlier tokens must run again."""
    clean: Mapping[str, Float[Tensor, "1 seq d_model"]]
    """Hook name -> the clean run's states."""


def runs_of(handle: ModelHandle, fact: Fact, sigma: float, settings: TraceSettings) -> Runs:
    """Both runs of a fact, with noise of size `sigma`.

    Raises BadRequestError where the model's top-1 token is not the expected answer's first, for a subject that no
    token covers, and for a model with activation edits, whose passes cannot be cut in pieces.
    """
    edits = ", ".join(edits_of(handle))
    if edits:
        raise BadRequestError(
            f"{handle.name} has activation edits ({edits}): what they decide from a whole prompt cannot be traced "
            "token by token; trace the base model"
        )
    encoded = handle.encode([fact.filled])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    subject = subject_tokens(fact, encoded["offsets"][0])
    inputs = [f"blocks.{layer}.hook_resid_pre" for layer in range(handle.n_layers)]
    outputs = [
        name.replace("resid_pre", point) for point in ("mlp_out", "attn_out", "resid_post") for name in inputs
    ]
    with record(handle, [*inputs, *outputs]) as clean:
        hidden = handle.hidden(ids, mask)
    answer = _answer(handle, fact, ids, hidden)
    rows = (ids.expand(settings.samples, -1), mask.expand(settings.samples, -1))
    with patch_embedding(handle, _corruption(subject, sigma, settings)):
        with record(handle, inputs) as seen:
            hidden_corrupted = handle.hidden(*rows)
        past = past_of(handle, *rows) if handle.architecture.prefix_cache else ()
    return Runs(
        handle=handle,
        input_ids=ids,
        subject=subject,
        answer=answer,
        p_clean=float(p_answer(handle, hidden, answer)[0]),
        corrupted=p_answer(handle, hidden_corrupted, answer),
        streams=[seen[name] for name in inputs],
        past=past,
        clean=clean,
    )


def subject_tokens(fact: Fact, offsets: Int[Tensor, "seq 2"]) -> tuple[int, int]:
    """First token that overlaps the subject, and the one after the last; raises BadRequestError where none does."""
    start = fact.prompt.index("{}")
    end = start + len(fact.subject)
    where = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero().flatten()
    if not len(where):
        raise BadRequestError(f"no token covers the subject {fact.subject!r} in {fact.filled!r}")
    return int(where[0]), int(where[-1]) + 1


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


def _last_logits(
    handle: ModelHandle, hidden: Float[Tensor, "rows seq d_model"]
) -> Float[Tensor, "rows vocab"]:
    last = hidden[:, -1:]
    return handle.logits_at(last, torch.ones(last.shape[:2], dtype=torch.bool, device=last.device)).float()


def p_answer(handle: ModelHandle, hidden: Tensor, answer: int) -> Float[Tensor, " rows"]:
    """Probability of the answer at each row's last position, float64."""
    logits = _last_logits(handle, hidden)
    # A few rows at a time stay in the processor's cache, which the sum over the vocabulary else leaves three times.
    total = torch.cat([rows.logsumexp(-1) for rows in logits.split(_ROWS)])
    return (logits[:, answer] - total).double().exp()
