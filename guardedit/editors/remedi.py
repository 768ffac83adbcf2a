"""REMEDI: a fact as a direction in the residual stream, read off a trained map (Hernandez, Li, Andreas 2023).

No weight is touched and nothing is optimised: direction = F([entity; attribute]) is added at the subject's last token
of a prompt, wherever the subject stands in it. Every other token gets what it gets by attending to that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.activation_parts import Push, TokenMatch
from guardedit.edits.activations import ActivationChange
from guardedit.edits.deltas import EditDelta
from guardedit.edits.descent import Plain, plain_of
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.representations import represent
from guardedit.edits.settings import require_number
from guardedit.edits.subjects import subject_sequences
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class RemediHparams:
    """Which map, and how much of its direction."""

    layer: int
    """The map of this layer's output; the kit must hold one for it."""
    alpha: float = 1.0
    """Times the direction that the map gives."""

    def __post_init__(self) -> None:
        require_number(self, "layer", least=0, whole=True)
        require_number(self, "alpha", least=0, above=True)


def solve_remedi(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: RemediHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve one request; the model is left as it was.

    Raises BadRequestError for more than one request, MissingStatisticsError without a map for the layer,
    StatisticsMismatchError with one of another width, SolveError where the direction is not finite.
    """
    if len(requests) != 1:
        raise BadRequestError(
            f"remedi edits one fact at a time, got {len(requests)}; plan them one by one (`--each`)"
        )
    request = requests[0]
    trained = inputs.map_of(handle, hparams.layer)
    inputs.tell("reading subject and object", 0.1)
    found = represent(handle, [(request, request.target_new)], trained.hook_name)
    direction = hparams.alpha * trained.directions(found)[0]
    if not bool(torch.isfinite(direction).all()):
        raise SolveError(
            f"the map of {trained.hook_name} gives {request.subject!r} a direction that is not finite; train it again"
        )
    change = remedi_change(handle, request, trained.hook_name, hparams.layer, direction)
    diagnostics: Plain = {
        "direction_norm": float(direction.norm()),
        "entity_norm": float(found.entity[0].norm()),
        "map_digest": trained.digest,
        "n_bytes": len(change.data),
    }
    return EditDelta((change,), "remedi", plain_of(hparams, inputs.seed), diagnostics)


def remedi_change(
    handle: ModelHandle,
    request: EditRequest,
    hook_name: str,
    layer: int,
    direction: Float[Tensor, " d_model"],
) -> ActivationChange:
    """The direction as an activation edit, at every place of a prompt where the subject's tokens end."""
    where = TokenMatch(subject_sequences(handle, request))
    label = f"{request.subject}: {request.filled} {request.target_new.strip()}"
    return ActivationChange(layer, Push(hook_name, direction.cpu().clone()), where, None, label)
