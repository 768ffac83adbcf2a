"""Editors: each solves requests into an EditDelta and leaves the model as it was.

A new editor is one file and one entry in EDITORS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guardedit.editors.alphaedit import AlphaEditHparams, solve_alphaedit
from guardedit.editors.contextual import ContextualHparams, solve_contextual
from guardedit.editors.emmet import EmmetHparams, solve_emmet
from guardedit.editors.finetune import FinetuneHparams, FinetuneLHparams, solve_finetune
from guardedit.editors.full_finetune import FullFinetuneHparams, solve_full_finetune
from guardedit.editors.guarded import GuardedHparams, solve_guarded
from guardedit.editors.lora import LoraHparams, solve_lora
from guardedit.editors.memit import MemitHparams, solve_memit
from guardedit.editors.remedi import RemediHparams, solve_remedi
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
    in_context: bool = False
    """Keeps a fact to the request's context; others change it everywhere, and take no request with a context."""
    needs_map: bool = False
    """Reads a map that was trained for the model; there is none until somebody trains it."""


EDITORS: dict[str, Editor] = {
    "rome": Editor(RomeHparams, solve_rome, "one fact, one layer, rank one, in closed form"),
    "guarded": Editor(
        GuardedHparams, solve_guarded, "rome with a value that leaves the rest of its subject where it is"
    ),
    "emmet": Editor(EmmetHparams, solve_emmet, "many facts, each met exactly, in closed form", joint=True),
    "memit": Editor(
        MemitHparams,
        solve_memit,
        "many facts, weighed against ordinary text, over several layers",
        joint=True,
    ),
    "alphaedit": Editor(
        AlphaEditHparams, solve_alphaedit, "many facts, written where ordinary text has no energy", joint=True
    ),
    "finetune": Editor(FinetuneHparams, solve_finetune, "FT-M: descent on one layer's matrix", joint=True),
    "finetune-l": Editor(
        FinetuneLHparams, solve_finetune, "FT-L: the same, no entry by more than a clamp", joint=True
    ),
    "finetune-full": Editor(FullFinetuneHparams, solve_full_finetune, "descent on all weights", joint=True),
    "contextual": Editor(
        ContextualHparams,
        solve_contextual,
        "rome's update as an activation edit: only where a gate finds the request's context",
        in_context=True,
    ),
    "remedi": Editor(
        RemediHparams,
        solve_remedi,
        "a direction from a trained map, added at the subject's last token",
        needs_map=True,
    ),
    "lora": Editor(LoraHparams, solve_lora, "low-rank adapters by peft, exported as weights", joint=True),
}
