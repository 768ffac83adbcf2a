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
from guardedit.edits.solvers import solve_batch
from guardedit.edits.spreading import Wanted
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class MemitHparams(BandHparams):
    """Where MEMIT writes, and how much ordinary text weighs."""

    ridge: float = 100.0
    """λ, in units of KᵀC⁻¹K: the published `mom2_update_weight`, as C is a mean over tokens there too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "ridge", least=0, above=True)


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
    return solve_wanted(
        handle, wanted, "memit", hparams, inputs,
        lambda problem: solve_batch(problem.keys, problem.residuals, moments[problem.layer], hparams.ridge),
    )  # fmt: skip
