"""Causal tracing: which states, once restored in a corrupted run, bring the fact back (Meng et al. 2022, section 2).

The published protocol (appendix B.1 and the authors' code): in ten rows with a corrupted subject, one state (token,
layer) at a time is set back to what it was in the clean run; the score is the mean probability of the clean run's top-1
token. The residual stream is restored at one layer, MLP and attention outputs in a window of layers.

What is computed is exactly that, in a fraction of the time. Attention is causal and blocks come one after another, so a
restoration at (token, layer) leaves every earlier token and every lower layer as the corrupted run has them: these are
remembered as keys, values and residual streams, and a restoration starts at its token and layer. All those at one
token go up the blocks as one batch, ten rows each, which each joins where it starts; windows that begin alike run once
as far as they are alike; an MLP runs only at the positions where its output is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.climb import Climb
from guardedit.models.corrupting import KINDS, Fact, Runs, TraceSettings, embedding_std, runs_of
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import patch, record, resume
from guardedit.models.restorations import (
    WINDOWED,
    Restoration,
    entry,
    forked,
    restorations,
    window_at,
    window_of,
)

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
    states, ordered = {**runs.clean, **_entries(runs, work)}, forked(work)
    for done, token in enumerate(range(first, n_tokens), start=1):
        climb = Climb(runs, states, token, settings.batch_tokens)
        for restoration, value in zip(ordered, climb.values(ordered), strict=True):
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
