"""Causal tracing: which states, once restored in a corrupted run, bring the fact back (Meng et al. 2022, section 2).

The published protocol (appendix B.1 and the authors' code): in ten rows with a corrupted subject, one state (token,
layer) at a time is set back to what it was in the clean run; the score is the mean probability of the clean run's top-1
token. The residual stream is restored at one layer, MLP and attention outputs in a window of layers.

What is computed is exactly that, in a fraction of the time. Attention is causal and blocks come one after another, so a
restoration at (token, layer) leaves every earlier token and every lower layer as the corrupted run has them: these are
remembered as keys, values and residual streams, and a pass starts at the restored token and layer. Restorations that
start at the same layer run together, each as ten rows of one batch; windows that begin alike run once as far as they
are alike; of the last block's MLP, only the last position is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.corrupting import KINDS, Fact, Runs, TraceSettings, embedding_std, p_answer, runs_of
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import Replace, patch, record, resume
from guardedit.models.partial import last_position_only
from guardedit.models.restorations import (
    WINDOWED,
    Restoration,
    entry,
    groups,
    resid_pre,
    restorations,
    window_at,
    window_of,
    with_leaders,
)
from guardedit.models.suffix import Suffix

__all__ = ["KINDS", "Fact", "Trace", "TraceSettings", "embedding_std", "trace", "window_at", "window_of"]

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
    work = restorations(runs.handle.n_layers, layers, settings)
    states = {**runs.clean, **_entries(runs, work)}
    leaders, rest = with_leaders(work)
    for done, token in enumerate(range(first, n_tokens), start=1):
        values, tails = _led(runs, states, token, leaders, rest)
        cells = list(zip(leaders, values, strict=True))
        for group in groups(rest, settings.samples * (n_tokens - token), settings.batch_tokens):
            cells += zip(group, _restored(runs, states, tails, token, group), strict=True)
        for restoration, value in cells:
            scores[restoration.kind][token, restoration.column] = value
        if progress is not None:
            progress(done / (n_tokens - first))
    return scores


def _entries(runs: Runs, work: Sequence[Restoration]) -> dict[str, Float[Tensor, "samples seq d_model"]]:
    """The first step of every window, for all tokens at once.

    Inside one block, an output that is restored at one token moves no other token: so one pass that restores it at all
    of them holds, at each, the stream that a restoration of that token alone goes on with.
    """
    handle = runs.handle
    rows = runs.input_ids.expand(len(runs.corrupted), -1)
    needed = {state for restoration in work for state in restoration.fixes.values()} - runs.clean.keys()
    found = {}
    for kind, point in WINDOWED.items():
        for layer in range(handle.n_layers - 1):
            if entry(kind, layer) not in needed:
                continue
            state, behind = runs.clean[f"blocks.{layer}.{point}"], f"blocks.{layer + 1}.hook_resid_pre"
            with (
                resume(handle, layer, runs.streams[layer]),
                patch(handle, f"blocks.{layer}.{point}", state.expand_as),
                record(handle, [behind], stop=True) as seen,
            ):
                handle.hidden(rows, torch.ones_like(rows))
            found[entry(kind, layer)] = seen[behind]
    return found


def _led(
    runs: Runs,
    states: Mapping[str, Tensor],
    token: int,
    leaders: Sequence[Restoration],
    work: Sequence[Restoration],
) -> tuple[list[float], dict[str, Float[Tensor, "samples tail d_model"]]]:
    """The leaders' values at `token`, and their streams at the blocks where shorter windows go on from them."""
    wanted = {
        state: (one.kind, name) for one in work for name, state in one.fixes.items() if state not in states
    }
    if not wanted:
        return _restored(runs, states, {}, token, leaders) if leaders else [], {}
    with record(runs.handle, sorted({name for _, name in wanted.values()})) as seen:
        values = _restored(runs, states, {}, token, leaders)
    samples = len(runs.corrupted)
    rows = {leader.kind: slice(at * samples, (at + 1) * samples) for at, leader in enumerate(leaders)}
    return values, {state: seen[name][rows[kind]] for state, (kind, name) in wanted.items()}


def _restored(
    runs: Runs,
    states: Mapping[str, Tensor],
    tails: Mapping[str, Tensor],
    token: int,
    group: Sequence[Restoration],
) -> list[float]:
    """Mean probability of the answer with each restoration of the group made at `token`."""
    handle, start, copies = runs.handle, group[0].start, len(group)
    samples = len(runs.corrupted)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for at, restoration in enumerate(group):
        for name, state in restoration.fixes.items():
            found = tails[state] if state in tails else states[state][:, token : token + 1]
            parts.setdefault(name, []).append((at * samples, found))
    fixes = {name: _fix(found, samples) for name, found in parts.items()}
    stream = runs.streams[start][:, token:].repeat(copies, 1, 1)
    # `resume` puts the stream in place whatever came before, so what is restored right there goes in by hand.
    here = fixes.pop(resid_pre(start), None)
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
    """Sets the first positions of some rows; a part is the first of its rows and their states (1 or samples, k, d)."""

    def fix(activation: Tensor) -> Tensor:
        fixed = activation.clone()
        for row, state in parts:
            fixed[row : row + samples, : state.shape[1]] = state
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
