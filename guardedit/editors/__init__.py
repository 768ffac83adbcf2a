"""Editors: each solves requests into an EditDelta and leaves the model as it was.

A new editor is one file and one entry in EDITORS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guardedit.editors.finetune import FinetuneHparams, solve_finetune
from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

Solve = Callable[[ModelHandle, Sequence[EditRequest], Any, SolveInputs], EditDelta]
"""(model, requests, the editor's settings, inputs) -> delta."""


@dataclass(frozen=True)
class Editor:
    """A method: its settings' type and its solver."""

    hparams: type[Any]
    solve: Solve
    summary: str
    joint: bool = False
    """Solves many requests as one delta; others take one request at a time."""


EDITORS: dict[str, Editor] = {
    "rome": Editor(RomeHparams, solve_rome, "one fact, one layer, rank one, in closed form"),
    "finetune": Editor(FinetuneHparams, solve_finetune, "gradient descent on one layer; the baseline"),
}
