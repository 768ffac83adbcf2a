"""Solved updates as frozen values. Matrices are `(d_out, d_in)` here, whatever the model's own layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.errors import SolveError


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = left @ right, float64."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The update as one matrix."""
        return self.left @ self.right

    def move(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """ΔW x for each key, in the dtype of x; computed in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        moved = (x.to(wide) @ self.right.T.to(x.device, wide)) @ self.left.T.to(x.device, wide)
        return moved.to(x.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int | None:
        """Number of factors."""
        return self.left.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Dense:
    """ΔW as a full matrix, for editors that are not low-rank (fine-tuning)."""

    matrix: Float[Tensor, "d_out d_in"]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The update as one float64 matrix."""
        return self.matrix.double()

    def move(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """ΔW x for each key, in the dtype of x; computed in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) @ self.matrix.T.to(x.device, wide)).to(x.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int | None:
        """None: not known to be low-rank."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The matrix by name."""
        return {"matrix": self.matrix}


Update = LowRank | Dense


@dataclass(frozen=True, eq=False)
class WeightChange:
    """An update of one layer's rewrite module (the MLP's down projection)."""

    parameter: str
    layer: int
    update: Update


@dataclass(frozen=True, eq=False)
class EditDelta:
    """A solved edit: updates of one or more layers, at most one each, and how they were found."""

    changes: tuple[WeightChange, ...]
    editor: str
    hparams: dict[str, float | int | str | bool | None]
    diagnostics: dict[str, float | int | str | bool | None]

    def __post_init__(self) -> None:
        layers = [change.layer for change in self.changes]
        if len(set(layers)) < len(layers):
            raise SolveError(f"a delta changes layers {sorted(layers)}: each may be there once; add them up")

    @property
    def layers(self) -> tuple[int, ...]:
        """Edited layers, lowest first."""
        return tuple(sorted(change.layer for change in self.changes))

    def update(self, layer: int) -> Update:
        """The update of one layer; KeyError where there is none."""
        return {change.layer: change.update for change in self.changes}[layer]
