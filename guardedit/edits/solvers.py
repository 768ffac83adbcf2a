"""The closed form shared by ROME, EMMET, MEMIT and AlphaEdit.

    ΔW = R (KᵀMK + λI)⁻¹ KᵀM

With M = C⁻¹ and one key, λ = 0, this is ROME (Meng et al. 2022, eq. 2), with several and λ = 0 EMMET (Gupta et al.
2024, eq. 8), with λ > 0 one layer of MEMIT (Meng et al. 2023, eq. 14, by the Woodbury identity; λ is its
`mom2_update_weight`). With M = P, a projector, it is AlphaEdit (Fang et al. 2024, eq. 13; see `preserving`).

M = FᵀF is given by its factor F, so keys are whitened once, Y = FK, and the system is solved in the smaller of two
spaces, in float64: B × B of YᵀY, or, with more keys than dimensions and λ > 0, that of YYᵀ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from guardedit.edits.spectrum import INDEPENDENT, count_independent, ends, scale_
from guardedit.edits.updates import Dense, LowRank, Update
from guardedit.errors import SolveError

_NOT_FINITE = "a key or the second moment is not finite; collect the statistics again"


class Metric(Protocol):
    """What a solver needs of a positive semidefinite M = FᵀF (d_in, d_in): its factor F (m, d_in), m <= d_in."""

    def whiten(self, x: Tensor) -> Tensor:
        """F x (m, n), float64; x is (d_in, n)."""
        ...

    def unwhiten(self, y: Tensor) -> Tensor:
        """Fᵀ y (d_in, n), float64; y is (m, n)."""
        ...


@dataclass(frozen=True, eq=False)
class Solution:
    """An update, and how well-posed the system was that gave it."""

    update: Update
    rank: int | None
    """Independent keys in the metric M, before a ridge; None where there are more keys than dimensions, or than
    `spectrum.EXACT` and a ridge."""
    condition: float
    """Condition number of the matrix that was inverted (of keys, scaled to a unit diagonal); an estimate above
    `spectrum.EXACT` rows."""


def solve(
    keys: Float[Tensor, "d_in batch"],
    residuals: Float[Tensor, "d_out batch"],
    metric: Metric,
    ridge: float = 0.0,
) -> Update:
    """The update of `solve_batch`, without the figures beside it."""
    return solve_batch(keys, residuals, metric, ridge).update


def solve_batch(
    keys: Float[Tensor, "d_in batch"],
    residuals: Float[Tensor, "d_out batch"],
    metric: Metric,
    ridge: float = 0.0,
) -> Solution:
    """The update that moves every key by its residual and text as little as possible.

    `ridge` is λ, in units of KᵀMK. The update is low-rank, residuals (d_out, B) times (KᵀMK + λI)⁻¹KᵀM (B, d_in), as
    long as that is smaller than the matrix, and float64. Raises SolveError when the keys are linearly dependent and λ
    is 0 or too small to tell them apart, and when anything is not finite.
    """
    _require_sound(residuals, ridge)
    whitened = metric.whiten(keys.double())
    # The metric decides where it is solved; keys may come from another device.
    residuals = residuals.to(whitened)
    if whitened.shape[1] > whitened.shape[0] and ridge:
        return _solve_wide(whitened, residuals, metric, ridge)
    gram = whitened.T @ whitened
    _require_keys(gram)
    rank = count_independent(gram) if ridge else gram.shape[0]
    gram.diagonal().add_(ridge)
    scale = scale_(gram)
    factor, condition = _factored(gram, ridge)
    if _as_factors(keys, residuals):
        towards = metric.unwhiten(whitened).T
        right = torch.cholesky_solve(towards / scale[:, None], factor) / scale[:, None]
        return Solution(LowRank(residuals, right), rank, condition)
    weights = torch.cholesky_solve(residuals.T / scale[:, None], factor) / scale[:, None]
    return Solution(Dense(metric.unwhiten(whitened @ weights).T.contiguous()), rank, condition)


def _as_factors(keys: Tensor, residuals: Tensor) -> bool:
    """Whether the two factors of the update hold fewer numbers than the matrix."""
    (d_in, batch), d_out = keys.shape, residuals.shape[0]
    return batch * (d_out + d_in) <= d_out * d_in


def _solve_wide(
    whitened: Float64[Tensor, "m batch"],
    residuals: Float64[Tensor, "d_out batch"],
    metric: Metric,
    ridge: float,
) -> Solution:
    """More keys than dimensions: R Yᵀ (YYᵀ + λI)⁻¹ F, the same update from a system of the dimensions' size."""
    gram = whitened @ whitened.T
    if not torch.isfinite(gram).all():
        raise SolveError(_NOT_FINITE)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    low, high = ends(gram, factor)
    moved = torch.cholesky_solve(whitened @ residuals.T, factor)
    return Solution(Dense(metric.unwhiten(moved).T.contiguous()), None, high / low)


def _require_sound(residuals: Tensor, ridge: float) -> None:
    if not (math.isfinite(ridge) and ridge >= 0):
        raise SolveError(f"ridge is {ridge}; it must be a finite number of at least 0")
    if not torch.isfinite(residuals).all():
        raise SolveError("a residual is not finite; the optimisation of the value went wrong")


def _require_keys(gram: Float64[Tensor, "batch batch"]) -> None:
    if not torch.isfinite(gram).all():
        raise SolveError(_NOT_FINITE)
    if not bool((gram.diagonal() > 0).all()):
        raise SolveError("a key is zero: nothing reaches the rewrite module there; edit another layer")


def _factored(
    scaled: Float64[Tensor, "batch batch"], ridge: float
) -> tuple[Float64[Tensor, "batch batch"], float]:
    """Cholesky factor of the scaled system and its condition; SolveError where keys cannot be told apart."""
    factor, info = torch.linalg.cholesky_ex(scaled)
    if int(info) == 0:
        low, high = ends(scaled, factor)
        if low > INDEPENDENT:
            return factor, high / low
    count = count_independent(scaled)
    raise SolveError(
        f"{scaled.shape[0]} keys span only {count or 'fewer'} directions (ridge {ridge:g}): two requests share a "
        "subject and the text before it, or there are more than the layer has room for. Drop some, plan them one after "
        "another, or use an editor with a ridge (memit, alphaedit)"
    )
