"""AlphaEdit: many facts at once, written only where ordinary text has little energy (Fang et al. 2024, eq. 13).

    minimise ‖ΔW K − R‖² + ‖ΔW K_e‖² + l2·‖ΔW‖²  over  ΔW = ΔW P

P projects onto the free directions of C (`preserving`), K_e are the keys of edits that are live. They are targets of
zero beside R, so that [K, K_e] and [R, 0] go through the same closed form as the other editors, with P for C⁻¹.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from guardedit.editors.located import BandHparams, find_wanted, moments_of, solve_wanted
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import keys_of
from guardedit.edits.preserving import FreeSpace, free_space
from guardedit.edits.settings import require_number
from guardedit.edits.solvers import Solution, solve_batch
from guardedit.edits.spreading import Problem, Wanted
from guardedit.edits.updates import LowRank
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


@dataclass(frozen=True)
class AlphaEditHparams(BandHparams):
    """Where AlphaEdit writes, and what it leaves alone."""

    preserved_energy: float = 0.9
    """Share of trace(C) whose directions no update touches."""
    l2: float = 0.1
    """Weight of ‖ΔW‖², in units of KᵀPK: a squared norm of keys in the free directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "preserved_energy", least=0)
        require_number(self, "l2", least=0, above=True)
        if self.preserved_energy >= 1:
            raise BadRequestError(
                f"preserved_energy is {self.preserved_energy}; it must be below 1, which would leave nowhere to write"
            )


def solve_alphaedit(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: AlphaEditHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve all requests as one update beside the edits that are live; the model is left as it was.

    Raises BadRequestError as `find_wanted` and `spread` do, statistics' errors as `SolveInputs.moment`, SolveError
    where nothing is left to write in.
    """
    _free_spaces(handle, hparams, inputs)
    return alphaedit(handle, find_wanted(handle, requests, hparams, inputs), hparams, inputs)


def alphaedit(
    handle: ModelHandle, wanted: Wanted, hparams: AlphaEditHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve for keys and values that are known already; see `solve_alphaedit`."""
    spaces, earlier = _free_spaces(handle, hparams, inputs), still_meant(inputs.earlier, wanted.requests)

    def solve_layer(problem: Problem) -> Solution:
        kept = _keys(handle, earlier, problem.layer, wanted.contexts)
        return solve_beside(problem, kept, spaces[problem.layer], hparams.l2)

    delta = solve_wanted(handle, wanted, "alphaedit", hparams, inputs, solve_layer)
    space = spaces[wanted.layer]
    about = {"earlier": len(earlier), "free_directions": space.axes.shape[1], "preserved_share": space.energy}
    return replace(delta, diagnostics={**delta.diagnostics, **about})


def solve_beside(
    problem: Problem, kept: Float64[Tensor, "d_in earlier"], space: FreeSpace, l2: float
) -> Solution:
    """Move the problem's keys by their residuals and the kept ones by nothing, within the free space."""
    keys = torch.cat([problem.keys, kept], 1)
    still = problem.residuals.new_zeros(problem.residuals.shape[0], kept.shape[1])
    found = solve_batch(keys, torch.cat([problem.residuals, still], 1), space, l2)
    if not isinstance(found.update, LowRank):
        return found
    count = problem.keys.shape[1]
    left, right = found.update.left[:, :count], found.update.right[:count]
    return replace(found, update=LowRank(left.contiguous(), right.contiguous()))


def still_meant(earlier: Sequence[EditRequest], now: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    """Earlier requests without those that are asked for again: what one of them wrote is meant to change."""
    again = {request.filled for request in now}
    return tuple(request for request in earlier if request.filled not in again)


def _keys(
    handle: ModelHandle, requests: Sequence[EditRequest], layer: int, contexts: Sequence[str]
) -> Float64[Tensor, "d_in n"]:
    if not requests:
        return torch.zeros(handle.d_in(layer), 0, dtype=torch.float64, device=handle.device)
    return torch.stack([key.k_star for key in keys_of(handle, requests, layer, contexts)], 1)


def _free_spaces(handle: ModelHandle, hparams: AlphaEditHparams, inputs: SolveInputs) -> dict[int, FreeSpace]:
    moments = moments_of(handle, hparams.band, inputs)
    return {layer: free_space(moment, hparams.preserved_energy) for layer, moment in moments.items()}
