"""Solved updates as frozen values. A linear map's matrix is `(d_out, d_in)` here, whatever the model's own layout.

A change may name any parameter. Those of rewrite modules (a layer's MLP down projection) are told apart: they alone
act on a key space, so they alone can be rehearsed by a hook and scored in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.errors import SolveError

if TYPE_CHECKING:
    from guardedit.edits.activations import ActivationChange


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
    """ΔW in full, for editors that are not low-rank (fine-tuning).

    What is no linear map (an embedding, a norm, a bias) has the parameter's own shape.
    """

    matrix: Float[Tensor, "*shape"]

    def dense(self) -> Float[Tensor, "*shape"]:
        """The update as one float64 tensor."""
        return self.matrix.double()

    def move(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """ΔW x for each key, in the dtype of x; computed in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) @ self.matrix.T.to(x.device, wide)).to(x.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in) of a linear map, else the parameter's own shape."""
        return tuple(self.matrix.shape)

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
    """An update of one parameter; `deltas.change_of` fills in what follows from its name."""

    parameter: str
    layer: int | None
    """The block it lies in; None for embeddings, final norm and unembedding."""
    update: Update
    rewrites: bool = True
    """It is the layer's rewrite module (the MLP's down projection)."""

    def __post_init__(self) -> None:
        if self.rewrites and self.layer is None:
            raise SolveError(f"{self.parameter} is called a rewrite module and lies in no layer")

    @property
    def lowest_layer(self) -> int:
        """The lowest block that is touched; 0, below which nothing is, for a parameter outside the blocks."""
        return self.layer or 0


Change: TypeAlias = "WeightChange | ActivationChange"
"""What a delta is made of: both have a `parameter`, a `layer` and a `lowest_layer`."""


@dataclass(frozen=True, eq=False)
class EditDelta:
    """A solved edit: updates of one or more parameters, at most one each, and how they were found.

    Beside updates of weights, or instead of them, it may bring activation edits.
    """

    changes: tuple[Change, ...]
    editor: str
    hparams: dict[str, float | int | str | bool | None]
    diagnostics: dict[str, float | int | str | bool | None]

    def __post_init__(self) -> None:
        if len(set(self.layers)) < len(self.layers):
            raise SolveError(
                f"a delta changes layers {list(self.layers)}: each may be there once; add them up"
            )
        twice = [name for name in self.parameters if self.parameters.count(name) > 1]
        if twice:
            raise SolveError(
                f"a delta changes {twice[0]} twice: each parameter may be there once; add them up"
            )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all changed parameters."""
        return tuple(change.parameter for change in self.changes)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose rewrite module is changed, lowest first."""
        return tuple(sorted(change.layer or 0 for change in self._rewrites))

    @property
    def touches_only_rewrite_modules(self) -> bool:
        """Nothing but rewrite modules is changed: at each layer a token with key x moves by ΔW x."""
        return len(self._rewrites) == len(self.changes)

    @property
    def lowest_layer(self) -> int:
        """The lowest block that is touched; 0, below which nothing is, with a parameter outside the blocks."""
        return min((change.lowest_layer for change in self.changes), default=0)

    @property
    def activation_edits(self) -> tuple[ActivationChange, ...]:
        """Changes that act on activations and leave the weights alone."""
        return tuple(change for change in self.changes if not isinstance(change, WeightChange))

    @property
    def _rewrites(self) -> tuple[WeightChange, ...]:
        return tuple(
            change for change in self.changes if isinstance(change, WeightChange) and change.rewrites
        )

    def update(self, layer: int) -> Update:
        """The update of a layer's rewrite module; KeyError where there is none."""
        return {change.layer: change.update for change in self._rewrites}[layer]
