"""Guarded: ROME's update with a value that leaves the rest of the subject where it is.

The largest damage of a single ROME edit falls on other relations of the same subject: the key is the same, so whatever
the value says there is said to every question about the subject. Here the value changes little of what the model says
about the subject, and asks of the edit a margin over the old answer (`guardedit.edits.contrast`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class GuardedHparams(RomeHparams):
    """ROME's settings; answers about the subject are kept, and prompts reworded, unless told otherwise."""

    steps: int = 18
    learning_rate: float = 1.0
    clamp_norm_factor: float = 5.0
    n_prefixes: int = 2
    reword: bool = True
    keep_openings: int = 12


def solve_guarded(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: GuardedHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve one request; the model is left as it was. Errors as `solve_rome`."""
    return replace(solve_rome(handle, requests, hparams, inputs), editor="guarded")
