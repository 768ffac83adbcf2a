"""ROME: one fact, one layer, rank one (Meng et al. 2022), with one key throughout (Gupta et al. 2024).

v_star = W k_star + r and ΔW = r (C⁻¹k_star)ᵀ / (k_starᵀ C⁻¹ k_star), solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guardedit.editors.located import LocatedHparams, find_wanted, solve_wanted
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_number
from guardedit.edits.solvers import solve_batch
from guardedit.edits.sparing import spared
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class RomeHparams(LocatedHparams):
    """Where and how ROME writes."""

    spare: float = 0.0
    """Weight at which namesakes are spared (`guardedit.edits.sparing`); 0 is the published method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "spare", least=0)


def solve_rome(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    hparams: RomeHparams,
    inputs: SolveInputs,
) -> EditDelta:
    """Solve one request; the model is left as it was.

    Raises BadRequestError for more than one request or a layer that the model does not have,
    MissingStatisticsError without the layer's second moment, StatisticsMismatchError with another layer's or another
    model's, SolveError where no finite update exists.
    """
    if len(requests) != 1:
        raise BadRequestError(
            f"rome edits one fact at a time, got {len(requests)}; plan them one by one, or together with memit, "
            "emmet or alphaedit"
        )
    moment = inputs.moment(handle, hparams.layer)
    wanted = find_wanted(handle, requests, hparams, inputs)
    moment = spared(handle, requests, wanted.contexts, moment, hparams.layer, hparams.spare)
    return solve_wanted(
        handle,
        wanted,
        "rome",
        hparams,
        inputs,
        lambda problem: solve_batch(problem.keys, problem.residuals, moment),
    )
