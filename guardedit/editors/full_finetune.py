"""Fine-tuning of all weights: the baseline that shows what an edit costs when nothing holds it in place.

Adam on the cross-entropy of the target's tokens, each at its own position, stopped early. A copy of the model is
trained and thrown away; what is left is a dense delta of every parameter that changed. The delta is float32, and the
last loss is measured on W + ΔW as it will be written, so figure and weights belong together bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from guardedit.edits.deltas import Dense, EditDelta, WeightChange, change_of, post_images, restore
from guardedit.edits.descent import (
    DescentHparams,
    descend,
    diagnostics_of,
    plain_of,
    require_finite,
    trainable_twin,
)
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.targets import TargetRows, parts_of, target_rows
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest


@dataclass(frozen=True)
class FullFinetuneHparams(DescentHparams):
    """Settings of the descent on all weights."""

    learning_rate: float = 1e-5


def solve_full_finetune(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    hparams: FullFinetuneHparams,
    inputs: SolveInputs,
) -> EditDelta:
    """Fine-tune every weight on the requests' prompts, all of them together; the model is left as it was.

    At its peak it holds five models in float32: the handle's, the copy, its gradient and Adam's two moments. Raises
    SolveError if the loss stops being a number, BadRequestError for no requests.
    """
    with preserved(handle), torch.enable_grad():
        batches = target_rows(handle, requests, hparams.contexts)
        twin = trainable_twin(handle)
        losses = descend(list(twin.model.parameters()), parts_of(twin, batches), hparams, inputs)
        twin.model.zero_grad()
        changes = tuple(differences(handle, twin))
        delta = EditDelta(changes, "finetune-full", plain_of(hparams, inputs.seed), {})
        losses[-1] = _loss_as_written(handle, twin, delta, batches)
    return EditDelta(changes, delta.editor, delta.hparams, diagnostics_of(losses))


def differences(handle: ModelHandle, trained: ModelHandle) -> Iterator[WeightChange]:
    """What training changed, in float32: a linear map's weight as (d_out, d_in)."""
    for name, _ in handle.model.named_parameters():
        moved = trained.oriented(name).detach() - handle.oriented(name).detach().float()
        if bool(moved.any()):
            yield change_of(handle, name, Dense(moved))


def _loss_as_written(
    handle: ModelHandle, twin: ModelHandle, delta: EditDelta, batches: Sequence[TargetRows]
) -> float:
    """The loss of W + ΔW: where a weight crosses zero, the float32 difference does not lead back to the last bit."""
    restore(twin, {name: image.float() for name, image in post_images(handle, delta).items()})
    with torch.no_grad():
        loss = sum(float(part()) for part in parts_of(twin, batches))
    require_finite(loss, "the last step")
    return loss
