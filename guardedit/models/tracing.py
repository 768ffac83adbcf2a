"""Causal tracing: which states, once restored in a corrupted run, bring the fact back (Meng et al. 2022, section 2).

The published protocol (appendix B.1 and the authors' code): in ten rows with a corrupted subject, one state (token,
layer) at a time is set back to what it was in the clean run; the score is the mean probability of the clean run's top-1
token. The residual stream is restored at one layer, MLP and attention outputs in a window of layers.

What is computed is exactly that, in a fraction of the time. Attention is causal and blocks come one after another, so a
restoration at (token, layer) leaves every earlier token and every lower layer as the corrupted run has them: these are
remembered as keys, values and residual streams, and a pass starts at the restored token and layer. Restorations that
start at the same layer run together, each as ten rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.corrupting import KINDS, Fact, Runs, TraceSettings, embedding_std, p_answer, runs_of
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import Replace, last_position_only, patch, record, resume
from guardedit.models.suffix import Suffix

__all__ = ["KINDS", "Fact", "Trace", "TraceSettings", "embedding_std", "trace", "window_at", "window_of"]

_WINDOWED = {"mlp": "hook_mlp_out", "attention": "hook_attn_out"}
PUBLISHED_WINDOW, PUBLISHED_DEPTH = 10, 28
"""The published window of layers, and the depth (GPT-J's) from which on it is taken as it is."""

Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1."""


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
    """Ten layers, as published, for 28 layers and more; for a shallower model in proportion fewer, at least one."""
    return max(1, min(PUBLISHED_WINDOW, round(PUBLISHED_WINDOW * n_layers / PUBLISHED_DEPTH)))


def window_at(layer: int, window: int, n_layers: int) -> range:
    """Layers restored together around `layer`: as many below as from it on (one more from it on if odd), clipped."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


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
    if not layers:
        raise BadRequestError(f"every is {settings.every}: {handle.name} has {handle.n_layers} layers only")
    with preserved(handle), torch.no_grad():
        runs = runs_of(handle, fact, settings.noise_factor * embedding_std, settings)
        scores = _tables(runs, layers, settings, progress)
    tokenizer = handle.tokenizer
    return Trace(
        tokens=tuple(tokenizer.decode([token]) for token in runs.input_ids[0].tolist()),
        subject=runs.subject,
        answer=tokenizer.decode([runs.answer]),
        p_clean=runs.p_clean,
        p_corrupted=float(runs.corrupted.mean()),
        layers=layers,
        scores=scores,
    )


def _tables(
    runs: Runs, layers: Sequence[int], settings: TraceSettings, progress: Progress | None
) -> dict[str, Float[Tensor, "tokens layers"]]:
    """Every restoration at every token, by kind."""
    n_tokens, first = runs.input_ids.shape[1], runs.subject[0]
    # Tokens before the subject are clean in every row: there is nothing to restore.
    untouched = torch.full((n_tokens, len(layers)), float(runs.corrupted.mean()), dtype=torch.float64)
    scores = {kind: untouched.clone() for kind in settings.kinds}
    work = _restorations(runs.handle.n_layers, layers, settings)
    states = {**runs.clean, **_entries(runs, work)}
    for done, token in enumerate(range(first, n_tokens), start=1):
        for group in _groups(work, settings.samples * (n_tokens - token), settings.batch_tokens):
            for restoration, value in zip(group, _restored(runs, states, token, group), strict=True):
                scores[restoration.kind][token, restoration.column] = value
        if progress is not None:
            progress(done / (n_tokens - first))
    return scores


@dataclass(frozen=True)
class _Restoration:
    """One cell of the table, whatever the token."""

    kind: str
    column: int
    start: int
    """The first block that has to be run."""
    fixes: Mapping[str, str]
    """Hook name -> which of the runs' states its token is set to there."""


def _restorations(n_layers: int, layers: Sequence[int], settings: TraceSettings) -> tuple[_Restoration, ...]:
    """Every kind and layer, by the block they start at."""
    window = settings.window or window_of(n_layers)
    found = []
    for kind in settings.kinds:
        for column, layer in enumerate(layers):
            span = window_at(layer, window, n_layers) if kind in _WINDOWED else range(layer, layer + 1)
            start, fixes = _steps(kind, span, n_layers)
            found.append(_Restoration(kind, column, start, fixes))
    return tuple(sorted(found, key=lambda restoration: restoration.start))


def _steps(kind: str, span: range, n_layers: int) -> tuple[int, dict[str, str]]:
    """The first block to run, and what to set where, for the layers of `span` restored."""
    point = _WINDOWED.get(kind, "hook_resid_post")
    if span[0] == n_layers - 1:
        only = f"blocks.{span[0]}.{point}"
        return span[0], {only: only}
    # What the first block gives is known for every token: the pass starts behind it.
    behind = f"blocks.{span[0] + 1}.hook_resid_pre"
    first = _entry(kind, span[0]) if kind in _WINDOWED else behind
    rest = [f"blocks.{layer}.{point}" for layer in span[1:]]
    return span[0] + 1, {behind: first, **{name: name for name in rest}}


def _entry(kind: str, layer: int) -> str:
    """Name of the stream behind block `layer` where that block's MLP or attention output is restored."""
    return f"{kind} of block {layer}"


def _entries(runs: Runs, work: Sequence[_Restoration]) -> dict[str, Float[Tensor, "samples seq d_model"]]:
    """The first step of every window, for all tokens at once.

    Inside one block, an output that is restored at one token moves no other token: so one pass that restores it at all
    of them holds, at each, the stream that a restoration of that token alone goes on with.
    """
    handle = runs.handle
    rows = runs.input_ids.expand(len(runs.corrupted), -1)
    needed = {state for restoration in work for state in restoration.fixes.values()} - runs.clean.keys()
    found = {}
    for kind, point in _WINDOWED.items():
        for layer in range(handle.n_layers - 1):
            if _entry(kind, layer) not in needed:
                continue
            state, behind = runs.clean[f"blocks.{layer}.{point}"], f"blocks.{layer + 1}.hook_resid_pre"
            with (
                resume(handle, layer, runs.streams[layer]),
                patch(handle, f"blocks.{layer}.{point}", state.expand_as),
                record(handle, [behind], stop=True) as seen,
            ):
                handle.hidden(rows, torch.ones_like(rows))
            found[_entry(kind, layer)] = seen[behind]
    return found


def _groups(
    work: Sequence[_Restoration], tokens_each: int, batch_tokens: int
) -> Iterator[list[_Restoration]]:
    """Consecutive restorations that run as one batch: those of one start, and of the next ones while they are few.

    A later start than the group's first means blocks that are run for nothing, so a group ends once it fills a pass.
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


def _restored(
    runs: Runs, states: Mapping[str, Tensor], token: int, group: Sequence[_Restoration]
) -> list[float]:
    """Mean probability of the answer with each restoration of the group made at `token`."""
    handle, start, copies = runs.handle, group[0].start, len(group)
    samples = len(runs.corrupted)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for at, restoration in enumerate(group):
        for name, state in restoration.fixes.items():
            parts.setdefault(name, []).append((at * samples, states[state][:, token]))
    fixes = {name: _fix(found, samples) for name, found in parts.items()}
    stream = runs.streams[start][:, token:].repeat(copies, 1, 1)
    # `resume` puts the stream in place whatever came before, so what is restored right there goes in by hand.
    here = fixes.pop(f"blocks.{start}.hook_resid_pre", None)
    suffix = _suffix(runs, token, start, copies, here(stream) if here else stream)
    with ExitStack() as stack:
        if runs.past:
            # Where earlier tokens run again, hooks see parts of rows: such a family's passes stay whole.
            stack.enter_context(last_position_only(handle))
        for name, fix in fixes.items():
            stack.enter_context(patch(handle, name, fix))
        hidden = suffix.hidden()
    means: list[float] = p_answer(handle, hidden, runs.answer).view(copies, samples).mean(1).tolist()
    return means


def _fix(parts: Sequence[tuple[int, Tensor]], samples: int) -> Replace:
    """Sets the first position of some rows; a part is the first of its rows and their states (one or samples, d)."""

    def fix(activation: Tensor) -> Tensor:
        fixed = activation.clone()
        for row, state in parts:
            fixed[row : row + samples, 0] = state
        return fixed

    return fix


def _suffix(runs: Runs, token: int, start: int, copies: int, stream: Tensor) -> Suffix:
    """The corrupted rows from `token` on, once a restoration, resumed at block `start` with `stream`."""
    rows, ids = len(stream), runs.input_ids
    # Layers below the start are skipped: theirs only have to say how long the past is.
    past = tuple(
        (keys[:, :, :token], values[:, :, :token])
        if layer < start
        else (keys[:, :, :token].repeat(copies, 1, 1, 1), values[:, :, :token].repeat(copies, 1, 1, 1))
        for layer, (keys, values) in enumerate(runs.past)
    )
    tail, before = ids[:, token:].expand(rows, -1), runs.streams[start][:, :token].repeat(copies, 1, 1)
    again = 0 if runs.past else token
    return Suffix(
        handle=runs.handle,
        layer=start,
        input_ids=tail,
        mask=torch.ones_like(tail, dtype=torch.bool),
        full_mask=torch.ones_like(ids).expand(rows, -1),
        position_ids=torch.arange(token, ids.shape[1], device=ids.device).expand(rows, -1),
        past=past if token else (),
        again=ids[:, :again].expand(rows, -1),
        resid_pre=torch.cat([before[:, :again], stream], 1),
    )
