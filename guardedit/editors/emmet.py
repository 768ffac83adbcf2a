"""EMMET: many facts at once, each met exactly, ordinary text moved as little as possible (Gupta et al. 2024, eq. 8).

    minimise tr(ΔW C ΔWᵀ)  subject to  ΔW K = R,  so  ΔW = R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹

With one fact it is ROME. The published code adds a constant to KᵀC⁻¹K, which turns it into MEMIT; here it does not,
unless a `ridge` is asked for. Over a band of layers, the last one meets what the others left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guardedit.editors.located import BandHparams, find_wanted, moments_of, solve_wanted
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_number
from guardedit.edits.solvers import Solution, solve_batch
from guardedit.edits.sparing import spared
from guardedit.edits.spreading import Problem, Wanted
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class EmmetHparams(BandHparams):
    """Where EMMET writes, and how exactly."""

    ridge: float = 0.0
    """λ relative to the mean of the diagonal of KᵀC⁻¹K; 0 meets every value exactly."""
    spare: float = 0.0
    """Weight at which namesakes are spared (`guardedit.edits.sparing`); 0 is the published method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "ridge", least=0)
        require_number(self, "spare", least=0)


def solve_emmet(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: EmmetHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve all requests as one update; the model is left as it was.

    Raises BadRequestError for more requests than the key space has dimensions (without a ridge) and as `find_wanted`
    does, statistics' errors as `SolveInputs.moment`, SolveError where the keys cannot be told apart.
    """
    moments_of(handle, hparams.band, inputs)
    _require_room(handle, len(requests), hparams)
    return emmet(handle, find_wanted(handle, requests, hparams, inputs), hparams, inputs)


def emmet(handle: ModelHandle, wanted: Wanted, hparams: EmmetHparams, inputs: SolveInputs) -> EditDelta:
    """Solve for keys and values that are known already; see `solve_emmet`."""
    moments = moments_of(handle, hparams.band, inputs)
    _require_room(handle, len(wanted.requests), hparams)

    def solve_layer(problem: Problem) -> Solution:
        moment = spared(
            handle, wanted.requests, wanted.contexts, moments[problem.layer], problem.layer, hparams.spare
        )
        ridge = hparams.ridge and hparams.ridge * float(moment.leverage(problem.keys).mean())
        return solve_batch(problem.keys, problem.residuals, moment, ridge)

    return solve_wanted(handle, wanted, "emmet", hparams, inputs, solve_layer)


def _require_room(handle: ModelHandle, count: int, hparams: EmmetHparams) -> None:
    room = min(handle.d_in(layer) for layer in hparams.band)
    if count > room and not hparams.ridge:
        raise BadRequestError(
            f"emmet meets every value exactly, and {count} requests are more than the {room} dimensions of a key: give "
            f"{room} at most, set a ridge, or use memit"
        )
