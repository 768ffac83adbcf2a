"""MEMIT: many facts at once, weighed against ordinary text, spread over a band of layers (Meng et al. 2023, eq. 14).

    minimise ‖ΔW K − R‖² + λ tr(ΔW C ΔWᵀ),  so  ΔW = R Kᵀ (λC + KKᵀ)⁻¹

at each layer; `spreading` says how layers share what is wanted. With λ towards 0 and one layer it is EMMET.
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
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class MemitHparams(BandHparams):
    """Where MEMIT writes, and how much ordinary text weighs."""

    ridge: float = 100.0
    """λ, in units of KᵀC⁻¹K: the published `mom2_update_weight`, as C is a mean over tokens there too."""
    spare: float = 0.0
    """Weight at which namesakes are spared (`guardedit.edits.sparing`); 0 is the published method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "ridge", least=0, above=True)
        require_number(self, "spare", least=0)


def solve_memit(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: MemitHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve all requests as one update; the model is left as it was.

    Raises BadRequestError as `find_wanted` and `spread` do, statistics' errors as `SolveInputs.moment`, SolveError
    where no finite update exists.
    """
    moments_of(handle, hparams.band, inputs)
    return memit(handle, find_wanted(handle, requests, hparams, inputs), hparams, inputs)


def memit(handle: ModelHandle, wanted: Wanted, hparams: MemitHparams, inputs: SolveInputs) -> EditDelta:
    """Solve for keys and values that are known already; see `solve_memit`."""
    moments = moments_of(handle, hparams.band, inputs)

    def solve_layer(problem: Problem) -> Solution:
        moment = spared(
            handle, wanted.requests, wanted.contexts, moments[problem.layer], problem.layer, hparams.spare
        )
        return solve_batch(problem.keys, problem.residuals, moment, hparams.ridge)

    return solve_wanted(handle, wanted, "memit", hparams, inputs, solve_layer)
