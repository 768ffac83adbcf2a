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

from guardedit.edits.updates import LowRank
from guardedit.errors import SolveError

INDEPENDENT = 1e-10
"""Smallest eigenvalue of the keys' correlation matrix (in the metric C⁻¹) that counts as independent keys.

Keys of one subject behind one text differ by the rounding of a forward pass in float32, some 1e-6 of their norm. A
constraint on their difference would be met by an enormous update, so they must count as one key.
"""


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
    (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹ (B, d_in), both float64. Raises SolveError when the keys are linearly dependent and λ is 0
    or too small to tell them apart, and when anything is not finite.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise SolveError(f"ridge is {ridge}; it must be a finite number of at least 0")
    if not torch.isfinite(residuals).all():
        raise SolveError("a residual is not finite; the optimisation of the value went wrong")
    whitened = second_moment.solve(keys.double())
    gram = keys.double().T @ whitened
    if ridge:
        gram = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    _require_rank(gram, ridge)
    return LowRank(left=residuals.double(), right=torch.linalg.solve(gram, whitened.T))


def _require_rank(gram: Float[Tensor, "batch batch"], ridge: float) -> None:
    if not torch.isfinite(gram).all():
        raise SolveError("a key or the second moment is not finite; collect the statistics again")
    scale = gram.diagonal().sqrt()
    if not bool((scale > 0).all()):
        raise SolveError("a key is zero: nothing reaches the rewrite module there; edit another layer")
    # Scaled to a unit diagonal, as keys of different norms are not thereby dependent.
    rank = int((torch.linalg.eigvalsh(gram / scale / scale[:, None]) > INDEPENDENT).sum())
    if rank < gram.shape[0]:
        raise SolveError(
            f"{gram.shape[0]} keys span only {rank} directions (ridge {ridge}); "
            "two requests share a subject and context: drop one, or use an editor with a ridge"
        )
