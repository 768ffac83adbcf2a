"""AlphaEdit's free space: the directions that ordinary text hardly uses, where an update may act (Fang et al. 2024).

P = U₀U₀ᵀ, U₀ the eigenvectors of C with the least energy. The published code takes eigenvalues under an absolute
threshold, which means something else for every model; here it is the share of trace(C) that is left untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from guardedit.errors import SolveError
from guardedit.models.second_moment import SecondMoment


@dataclass(frozen=True, eq=False)
class FreeSpace:
    """The projector onto the free directions, as a metric for `solvers.solve_batch`: M = P."""

    axes: Float64[Tensor, "d_in free"]
    """U₀: orthonormal columns."""
    energy: float
    """Share of trace(C) in the directions that are left untouched."""

    def whiten(self, x: Float[Tensor, "d_in n"]) -> Float64[Tensor, "free n"]:
        """Coordinates in the free space."""
        return self.axes.T @ x.to(self.axes)

    def unwhiten(self, y: Float64[Tensor, "free n"]) -> Float64[Tensor, "d_in n"]:
        """Back from coordinates: `unwhiten(whiten(x))` is Px."""
        return self.axes @ y


def free_space(moment: SecondMoment, preserved_energy: float) -> FreeSpace:
    """The largest free space that leaves at least `preserved_energy` of trace(C) untouched.

    Raises SolveError where nothing is left to write in, or C is not positive.
    """
    values, axes = moment.eigen
    total = float(values.sum())
    if not (bool(torch.isfinite(values).all()) and total > 0):
        raise SolveError(f"the second moment of {moment.hook_name} has no energy; collect it from more text")
    # Rounding gives a singular C eigenvalues just below zero.
    taken = values.clamp(min=0).cumsum(0) / total
    free = int((taken <= 1 - preserved_energy).sum())
    if not free:
        raise SolveError(
            f"preserved_energy {preserved_energy:g} leaves no direction of {moment.hook_name} to write in: the least "
            f"used one holds {float(taken[0]):.2g} of the energy; lower it"
        )
    return FreeSpace(axes[:, :free].contiguous(), 1 - float(taken[free - 1]))
