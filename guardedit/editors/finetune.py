"""Fine-tuning of one layer's rewrite module: the baselines that every editing paper starts from.

FT-M (`finetune`): cross-entropy on the target's tokens only, all of them, each at its own position. FT-L
(`finetune-l`): the same under the constraint ‖ΔW‖∞ <= clamp, kept after every step (Zhu et al. 2020). The FT-L of
Meng et al. (2022) also scores every target token at the prompt's last position, which makes a target of several
tokens unlearnable; `score_at = "prompt_end"`, `stop_loss = 0.01` is that method. The result is a dense delta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from guardedit.edits.deltas import Dense, EditDelta, WeightChange
from guardedit.edits.descent import DescentHparams, descend, diagnostics_of, plain_of
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_number
from guardedit.edits.targets import ScoreAt, TargetRows, target_nll, target_rows
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import key_hook, patch, record, resume, rewrite_hook
from guardedit.models.installed import whole_from
from guardedit.records import EditRequest


@dataclass(frozen=True)
class FinetuneHparams(DescentHparams):
    """Settings of FT-M."""

    layer: int = 0
    clamp: float | None = None
    """Largest change of any entry; None leaves it free."""
    score_at: ScoreAt = "own"
    """Where each target token is scored: at its own position, or all at the prompt's end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "layer", least=0, whole=True)
        if self.clamp is not None:
            require_number(self, "clamp", least=0, above=True)
        if self.score_at not in get_args(ScoreAt):
            raise BadRequestError(
                f"score_at is {self.score_at!r}; it is one of {', '.join(get_args(ScoreAt))}"
            )


@dataclass(frozen=True)
class FinetuneLHparams(FinetuneHparams):
    """Settings of FT-L: there is always a clamp."""

    clamp: float | None = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "clamp", least=0, above=True)


def solve_finetune(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    hparams: FinetuneHparams,
    inputs: SolveInputs,
) -> EditDelta:
    """Fine-tune one layer on the requests' prompts, all of them together; the model is left as it was.

    Raises SolveError if the loss stops being a number, BadRequestError for no requests or no such layer.
    """
    layer = hparams.layer
    with preserved(handle), torch.enable_grad():
        batches = target_rows(handle, requests, hparams.contexts, hparams.score_at)
        weight = handle.weight(layer)
        matrix = torch.zeros(weight.shape, device=weight.device, requires_grad=True)
        parts = [_part(handle, rows, layer, matrix) for rows in batches]
        losses = descend([matrix], parts, hparams, inputs, partial(_clamp, matrix, hparams.clamp))
    change = WeightChange(handle.rewrite_parameter(layer), layer, Dense(matrix.detach()))
    editor = "finetune-l" if isinstance(hparams, FinetuneLHparams) else "finetune"
    return EditDelta((change,), editor, plain_of(hparams, inputs.seed), diagnostics_of(losses))


def _part(handle: ModelHandle, rows: TargetRows, layer: int, matrix: Tensor) -> Callable[[], Tensor]:
    """The loss of some rows with ΔW = `matrix` (d_out, d_in); what lies below the layer is computed once."""
    start = whole_from(handle, layer)
    name = f"blocks.{start}.hook_resid_pre"
    with torch.no_grad(), record(handle, [name], stop=True) as seen:
        handle.hidden(rows.input_ids, rows.attention_mask)
    return lambda: _loss(handle, rows, layer, matrix, (start, seen[name]))


def _loss(
    handle: ModelHandle, rows: TargetRows, layer: int, matrix: Tensor, entered: tuple[int, Tensor]
) -> Tensor:
    """`entered`: the block to go on from, and its input."""
    keys: list[Tensor] = []

    def keep(key: Tensor) -> Tensor:
        keys[:] = [key]
        return key

    with (
        resume(handle, *entered),
        patch(handle, key_hook(layer), keep),
        patch(handle, rewrite_hook(layer), lambda output: output + Dense(matrix).move(keys[0])),
    ):
        hidden = handle.hidden(rows.input_ids, rows.attention_mask)
    return target_nll(handle, rows, hidden)


def _clamp(matrix: Tensor, clamp: float | None) -> None:
    if clamp is not None:
        with torch.no_grad():
            matrix.clamp_(-clamp, clamp)
