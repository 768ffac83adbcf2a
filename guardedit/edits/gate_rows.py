"""A fitted gate as rows: encoder rows of the latents that it weighs, directions in their place where it reads means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import Example
from guardedit.errors import BadRequestError, SolveError
from guardedit.saes.checkpoints import Sae

if TYPE_CHECKING:
    from guardedit.edits.gates import Pooled

NO_LATENT = -1
"""Stands for a direction in a gate's list of latents."""
ALWAYS = -1e30
"""A threshold that every pre-activation exceeds."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Rows of a gate and what each says for each kind of context, the gate's own first."""

    w_enc: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]
    threshold: Float[Tensor, " n"]
    weights: Float[Tensor, "n kinds"]
    bias: Float[Tensor, " kinds"]
    labels: tuple[str, ...]
    latents: tuple[int, ...]
    rooted: bool


def direction_rows(
    weights: Float[Tensor, "kinds d"], bias: Tensor, sae: Sae | None, hook_name: str, names: Sequence[str]
) -> Reader:
    """A read-out direction a kind in place of latents: the mean of w·x is w·(the mean of x). Of two kinds the second
    has none."""
    kinds = len(weights)
    told = weights[:1] if kinds == 2 else weights
    back = torch.zeros(len(told)) if sae is None else told @ sae.b_dec.float().cpu()
    own = f"a direction at {hook_name}"
    labels = (own,) if kinds == 2 else tuple(f"{own} for {name}" for name in names)
    return Reader(
        told, back, torch.full((len(told),), ALWAYS), torch.eye(kinds)[: len(told)], bias, labels,
        (NO_LATENT,) * len(told), rooted=False,
    )  # fmt: skip


def encoder_rows(
    weights: Float[Tensor, "kinds d_sae"], bias: Tensor, matters: Float[Tensor, " d_sae"], sae: Sae | None
) -> Reader:
    """The encoder rows of the latents that any kind weighs, those that matter most first: by weight on a feature's own
    spread, as a rare latent has a large weight by itself."""
    if sae is None:
        raise BadRequestError("a gate on latents needs an SAE where it reads; use gate = 'activations'")
    picked = weights.any(0).nonzero()[:, 0]
    picked = picked[matters[picked].argsort(descending=True)]
    if not len(picked):
        raise SolveError("no latent tells the context apart; use gate = 'activations'")
    numbers = tuple(picked.tolist())
    return Reader(
        sae.W_enc.T[picked].float(), sae.b_enc[picked].float(), sae.threshold[picked].float(),
        weights[:, picked].T, bias, tuple(sae.labels[number].label for number in numbers), numbers, rooted=True,
    )  # fmt: skip


def gate_of(
    hook_name: str, readers: Sequence[Reader], sae: Sae | None, limit: float, rivals: tuple[str, ...]
) -> Gate:
    """All rows as one gate, the rooted ones first; without `rivals` only what speaks for its own kind."""
    rows = {
        name: torch.cat([getattr(one, name) for one in readers]).contiguous()
        for name in ("w_enc", "b_enc", "threshold", "weights")
    }
    weights, bias = rows.pop("weights"), torch.stack([one.bias for one in readers]).sum(0)
    b_dec = torch.zeros(rows["w_enc"].shape[1]) if sae is None else sae.b_dec.float().cpu()
    against = {} if not rivals else {
        "rivals": weights[:, 1:].contiguous(), "rival_bias": bias[1:].contiguous(), "rival_names": rivals
    }  # fmt: skip
    return Gate(
        hook_name=hook_name, b_dec=b_dec, weights=weights[:, 0].contiguous(), bias=float(bias[0]), limit=limit,
        pool="mean", rooted=sum(len(one.weights) for one in readers if one.rooted),
        labels=sum((one.labels for one in readers), ()), latents=sum((one.latents for one in readers), ()),
        **rows, **against,  # type: ignore[arg-type]
    )  # fmt: skip


def explained(
    gate: Gate, made: Sequence[Example], means: Pooled, sae: Sae, top: int = 8
) -> list[tuple[int, float]]:
    """What an activation gate looks at, in words: the latents whose decoder directions carry most of the difference
    between its mean read-out inside and outside, each with its share of that difference. Against rivals the read-out
    is its own less their mean."""
    if means.latents is None:
        return []
    inside = torch.tensor([example.inside for example in made])
    change = means.latents[inside].mean(0) - means.latents[~inside].mean(0)
    rows = slice(gate.rooted, None)
    direction = gate.w_enc[rows].T.to(sae.W_dec.dtype) @ gate.net[rows].to(sae.W_dec.dtype)
    carried = change * (sae.W_dec @ direction).to(change)
    whole = (means.acts[inside].mean(0) - means.acts[~inside].mean(0)) @ direction.to(means.acts)
    order = carried.argsort(descending=True)[:top].tolist()
    return [(index, float(carried[index] / whole)) for index in order]
