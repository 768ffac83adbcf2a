"""The loop of the locate-then-edit editors: keys and values of a batch, then one solve a layer (Meng et al. 2023).

Values belong to one layer, the last of a band. Each layer below it takes an equal share of what is still missing
there: for l ascending, keys and the hidden state at the value layer are measured again with the lower layers' updates
in place (rehearsed, nothing is written), and r = (z − h) / (layers left). At the value layer that is all that is left.

With a norm behind the MLP, an update of a lower layer does not reach the residual stream linearly; there a band has
one layer, and values live at its rewrite module's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from guardedit.edits.deltas import EditDelta, WeightChange, rehearsed
from guardedit.edits.keys import Key, keys_of, last_token_of, subject_span
from guardedit.edits.solvers import Solution
from guardedit.edits.values import Value
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import record
from guardedit.records import EditRequest


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a batch of facts asks of one layer: the same for every solver, and most of an edit's cost."""

    requests: tuple[EditRequest, ...]
    contexts: tuple[str, ...]
    layer: int
    """The value layer."""
    keys: tuple[Key, ...]
    """Of the value layer, on the model as it is."""
    values: tuple[Value, ...]

    @property
    def residuals(self) -> Float64[Tensor, "d_out batch"]:
        """R, a column a request."""
        return torch.stack([value.residual for value in self.values], 1)


@dataclass(frozen=True, eq=False)
class Problem:
    """What one layer shall do: move each key by its residual. The model has the lower layers' updates in place."""

    layer: int
    keys: Float64[Tensor, "d_in batch"]
    residuals: Float64[Tensor, "d_out batch"]


@dataclass(frozen=True, eq=False)
class Spread:
    """Updates of a band, and how each was solved."""

    changes: tuple[WeightChange, ...]
    solutions: tuple[Solution, ...]
    missed: float
    """‖z − h‖ / ‖R‖ at the value layer with all updates in place, as solved: 0 where every value is met."""


SolveLayer = Callable[[Problem], Solution]


def spread(
    handle: ModelHandle,
    wanted: Wanted,
    band: Sequence[int],
    solve_layer: SolveLayer,
    progress: Callable[[int], None] | None = None,
) -> Spread:
    """Solve the layers of `band`, ascending; its last one is the value layer. The model is left as it was.

    `progress` is told how many layers are done. Raises BadRequestError for another band, or one of several layers in
    a family with a norm behind the MLP.
    """
    _require_band(handle, wanted, band)
    changes: list[WeightChange] = []
    solutions: list[Solution] = []
    before = _hidden(handle, wanted) if len(band) > 1 else None
    missing = wanted.residuals
    for number, layer in enumerate(band):
        with rehearsed(handle, EditDelta(tuple(changes), "partial", {}, {})):
            if changes and before is not None:
                missing = wanted.residuals - (_hidden(handle, wanted) - before)
            problem = Problem(
                layer, _keys(handle, wanted, layer, changed=bool(changes)), missing / (len(band) - number)
            )
            solutions.append(solve_layer(problem))
        changes.append(WeightChange(handle.rewrite_parameter(layer), layer, solutions[-1].update))
        if progress is not None:
            progress(number + 1)
    left = missing - solutions[-1].update.move(problem.keys.T).T
    # With no steps at all R is zero, and so is what is left of it.
    size = float(wanted.residuals.norm())
    return Spread(tuple(changes), tuple(solutions), float(left.norm()) / size if size else 0.0)


def _require_band(handle: ModelHandle, wanted: Wanted, band: Sequence[int]) -> None:
    if list(band) != sorted(set(band)) or not band or band[-1] != wanted.layer:
        raise BadRequestError(
            f"layers {tuple(band)} are no band for values of layer {wanted.layer}: name each layer once, ascending, "
            f"the value layer last"
        )
    norm = handle.architecture.post_mlp_norm
    if norm is not None and len(band) > 1:
        raise BadRequestError(
            f"layers are {tuple(band)}, but {handle.name} ({handle.architecture.name}) has {norm} behind its MLP: what "
            f"a lower layer adds does not reach layer {wanted.layer} linearly. Edit layer {wanted.layer} alone: leave "
            "`layers` empty"
        )


def _keys(handle: ModelHandle, wanted: Wanted, layer: int, *, changed: bool) -> Float64[Tensor, "d_in batch"]:
    keys = wanted.keys
    if changed or layer != wanted.layer:
        keys = keys_of(handle, wanted.requests, layer, wanted.contexts)
    return torch.stack([key.k_star for key in keys], 1)


def _hidden(handle: ModelHandle, wanted: Wanted, batch_size: int = 64) -> Float64[Tensor, "d_model batch"]:
    """Residual stream behind the value layer at each subject's last token, averaged over contexts as keys are."""
    hook = f"blocks.{wanted.layer}.hook_resid_post"
    rows = [(request, context) for request in wanted.requests for context in wanted.contexts]
    found = torch.zeros(len(rows), handle.d_model, dtype=torch.float64, device=handle.device)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][1] + rows[row][0].filled))
    for start in range(0, len(rows), batch_size):
        chunk = order[start : start + batch_size]
        batch = handle.encode([rows[row][1] + rows[row][0].filled for row in chunk])
        spans = [subject_span(*rows[row]) for row in chunk]
        positions = last_token_of(batch["offsets"], batch["attention_mask"], spans)
        with torch.no_grad(), preserved(handle), record(handle, [hook], stop=True) as seen:
            handle.hidden(batch["input_ids"], batch["attention_mask"])
        found[chunk] = seen[hook][torch.arange(len(chunk)), positions].double()
    return found.reshape(len(wanted.requests), len(wanted.contexts), -1).mean(1).T
