"""The closed form shared by ROME, EMMET and MEMIT.

    ΔW = R (KᵀC⁻¹K + λI)⁻¹ KᵀC⁻¹

With one key and λ = 0 this is ROME (Meng et al. 2022, eq. 2), with several and λ = 0 EMMET (Gupta et al. 2024, eq. 8),
with λ > 0 one layer of MEMIT (Meng et al. 2023, eq. 14, by the Woodbury identity). It is solved in the
min(B, d_in)-dimensional space, in float64.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.deltas import LowRank
from guardedit.errors import SolveError


class Metric(Protocol):
    """What a solver needs of a second moment C (d_in, d_in)."""

    def solve(self, x: Tensor) -> Tensor:
        """C⁻¹ x, float64; x is (d_in,) or (d_in, n)."""
        ...


def solve(
    keys: Float[Tensor, "d_in batch"],
    residuals: Float[Tensor, "d_out batch"],
    second_moment: Metric,
    ridge: float = 0.0,
) -> LowRank:
    """The update that moves every key by its residual and text as little as possible.

    `ridge` is λ, in units of KᵀC⁻¹K. The left factor holds the residuals (d_out, B), the right one
    (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹ (B, d_in), both float64. Raises SolveError when the keys are linearly dependent and λ = 0.
    """
    if ridge < 0 or not math.isfinite(ridge):
        raise SolveError(f"ridge is {ridge}; it must be a finite number of at least 0")
    whitened = second_moment.solve(keys.double())
    gram = keys.double().T @ whitened
    if ridge:
        gram = gram + ridge * torch.eye(gram.shape[0], dtype=torch.float64)
    _require_rank(gram, ridge)
    return LowRank(left=residuals.double(), right=torch.linalg.solve(gram, whitened.T))


def _require_rank(gram: Float[Tensor, "batch batch"], ridge: float) -> None:
    if not torch.isfinite(gram).all():
        raise SolveError("a key or the second moment is not finite; collect the statistics again")
    rank = int(torch.linalg.matrix_rank(gram, hermitian=True))
    if rank < gram.shape[0]:
        raise SolveError(
            f"{gram.shape[0]} keys span only {rank} directions (ridge {ridge}); "
            "two requests share a subject and context: drop one, or use an editor with a ridge"
        )
