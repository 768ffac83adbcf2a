"""What an activation edit is made of: an action, a rule for positions, a gate. Frozen values that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.updates import LowRank
from guardedit.errors import BadRequestError


@dataclass(frozen=True, eq=False)
class Move:
    """Adds ΔW x to what the layer's rewrite module puts out, x being what it is given: as if it were in the weights."""

    update: LowRank

    def __post_init__(self) -> None:
        for name, factor in self.update.tensors().items():
            _check(factor, (None, None), f"the update's {name} factor")
        if self.update.left.shape[1] != self.update.right.shape[0]:
            raise BadRequestError(
                f"the update's factors are {list(self.update.left.shape)} and {list(self.update.right.shape)}; "
                "the first's columns must be the second's rows"
            )


@dataclass(frozen=True, eq=False)
class Push:
    """h becomes beta·h + direction at a hook."""

    hook_name: str
    direction: Float[Tensor, " d_model"]
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check(self.direction, (None,), "the direction")
        _check_number(self.beta, "beta")


@dataclass(frozen=True, eq=False)
class KeyMatch:
    """Positions whose key x, the input of the layer's rewrite module, has read_out·x of `least` at least.

    With the right factor of a rank-one ΔW that is solved for its own key, read_out·x is p(x): 1 at that key.
    """

    read_out: Float[Tensor, " d_in"]
    least: float

    def __post_init__(self) -> None:
        _check(self.read_out, (None,), "the read-out of a key rule")
        _check_number(self.least, "the least value of a key rule")


@dataclass(frozen=True)
class TokenMatch:
    """Positions of the last token of any of the sequences, among those that decide: a prompt's, never an answer's.

    Only a sequence that lies within one forward pass is found, not one whose beginning is in the cache already.
    """

    sequences: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        whole = isinstance(self.sequences, tuple) and all(isinstance(one, tuple) for one in self.sequences)
        ids = [token for one in self.sequences for token in one] if whole else []
        if not ids or not all(self.sequences) or any(type(token) is not int or token < 0 for token in ids):
            raise BadRequestError(
                f"token sequences {self.sequences!r}: give one or more non-empty tuples of token ids"
            )


@dataclass(frozen=True)
class Everywhere:
    """Every position."""


@dataclass(frozen=True, eq=False)
class Gate:
    """A linear read-out of SAE latents, with all that it takes of the SAE: none is needed at run time.

    pre = (x − b_dec)·w_encᵀ + b_enc; a latent is pre where pre > threshold, else 0. Its largest value (`pool` "max") or
    its mean ("mean") over the segment's deciding positions, for the first `rooted` of them the root of that, is
    weighed: Σ weights·latent + bias, from which log Σ exp of what speaks for each rival kind of context is taken, where
    there are rivals: the log-odds of a softmax. The gate fires where that is `limit` at least. A row's first token does
    not decide beside others: its activations are unlike any other token's.
    JumpReLU as in Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435.
    """

    hook_name: str
    w_enc: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]
    threshold: Float[Tensor, " n"]
    b_dec: Float[Tensor, " d"]
    """Subtracted from the activation first; zeros where the SAE does not."""
    weights: Float[Tensor, " n"]
    bias: float
    limit: float
    labels: tuple[str, ...] = ()
    """For people: one a latent, or none."""
    latents: tuple[int, ...] = ()
    """The latents' numbers in their SAE: one a latent, or none."""
    pool: str = "max"
    """What stands for a segment: the "max" or the "mean" of each latent."""
    rooted: int = 0
    """How many of the latents, the first ones, are weighed by the square root of what is pooled."""
    rivals: Float[Tensor, "n kinds"] | None = None
    """What each latent says for each rival kind; None where there is none."""
    rival_bias: Float[Tensor, " kinds"] | None = None
    rival_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.w_enc, (None, None), "the gate's w_enc")
        n, d = self.w_enc.shape
        for name, size in (("b_enc", n), ("threshold", n), ("b_dec", d), ("weights", n)):
            _check(getattr(self, name), (size,), f"the gate's {name}")
        for name in ("bias", "limit"):
            _check_number(getattr(self, name), f"the gate's {name}")
        self._check_rivals()
        if self.pool not in ("max", "mean") or type(self.rooted) is not int or not 0 <= self.rooted <= n:
            raise BadRequestError(
                f"the gate pools by {self.pool!r}, rooted {self.rooted!r}; pool is 'max' or 'mean', rooted 0 to {n}"
            )
        for name, kind in (("labels", str), ("latents", int)):
            given = getattr(self, name)
            if len(given) not in (0, n) or not all(type(one) is kind for one in given):
                raise BadRequestError(
                    f"the gate's {name} are {given!r}; give {n}, one a latent as {kind.__name__}, or none"
                )

    def _check_rivals(self) -> None:
        """Raise BadRequestError unless there are weights, a bias and a name a rival, or none of the three."""
        if self.rivals is None and self.rival_bias is None and not self.rival_names:
            return
        kinds = len(self.rival_names)
        _check(self.rivals, (len(self.weights), kinds), "the gate's rivals")
        _check(self.rival_bias, (kinds,), "the gate's rival_bias")
        if not all(type(name) is str for name in self.rival_names):
            raise BadRequestError(f"the gate's rival_names are {self.rival_names!r}; they must be texts")

    @property
    def net(self) -> Float[Tensor, " n"]:
        """What each latent weighs against the mean rival: all of what it weighs where there is none."""
        return self.weights if self.rivals is None else self.weights - self.rivals.mean(1)

    def latent_acts(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n latents"]:
        """The latents' activations; computed in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        w_enc, b_enc, threshold, b_dec = (
            part.to(x.device, wide) for part in (self.w_enc, self.b_enc, self.threshold, self.b_dec)
        )
        pre = (x.to(wide) - b_dec) @ w_enc.T + b_enc
        return torch.where(pre > threshold, pre, torch.zeros_like(pre))

    def logit(self, pooled: Float[Tensor, "*n latents"]) -> Float[Tensor, " *n"]:
        """What is compared with `limit`; `pooled` are the segment's largest or mean latents, before any root."""
        if self.rooted:
            roots = pooled[..., : self.rooted].clamp(min=0).sqrt()
            pooled = torch.cat([roots, pooled[..., self.rooted :]], -1)
        own = pooled @ self.weights.to(pooled.device, pooled.dtype) + self.bias
        if self.rivals is None or self.rival_bias is None:
            return own
        rivals, bias = (part.to(pooled.device, pooled.dtype) for part in (self.rivals, self.rival_bias))
        return own - (pooled @ rivals + bias).logsumexp(-1)


Action = Move | Push
Where = KeyMatch | TokenMatch | Everywhere
Part = TypeVar("Part", bound=Move | Push | KeyMatch | TokenMatch | Everywhere | Gate)


def placed(part: Part, device: torch.device, dtype: torch.dtype) -> Part:
    """The part with its tensors on a device and of a type: what is used in every pass is brought there once."""
    if isinstance(part, Move):
        moved = {name: one.to(device, dtype) for name, one in part.update.tensors().items()}
        return replace(part, update=LowRank(**moved))
    found = {field.name: getattr(part, field.name) for field in fields(part)}
    tensors: dict[str, Any] = {
        name: x.to(device, dtype) for name, x in found.items() if isinstance(x, Tensor)
    }
    return replace(part, **tensors)


def _check(tensor: object, shape: tuple[int | None, ...], what: str) -> None:
    """Raise BadRequestError unless it is a finite floating-point tensor of the shape, not empty."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise BadRequestError(f"{what} is {tensor!r:.80}; it must be a tensor of floating-point numbers")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        want not in (None, is_) for want, is_ in zip(shape, sizes, strict=True)
    ):
        words = ", ".join("any" if size is None else str(size) for size in shape)
        raise BadRequestError(f"{what} has the shape {list(sizes)}; it must be ({words})")
    if not tensor.numel() or not bool(torch.isfinite(tensor).all()):
        raise BadRequestError(f"{what} is empty or has an entry that is not finite; solve the edit again")


def _check_number(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequestError(f"{what} is {value!r}; it must be a finite number")
