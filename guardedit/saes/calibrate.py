"""From TopK to JumpReLU: one fixed threshold a latent, chosen on text that training did not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from guardedit.saes.checkpoints import jump_relu

if TYPE_CHECKING:
    from guardedit.saes.train import Weights

Rule = Literal["global", "per-latent"]
CHUNK = 2048
KEPT = 8
"""Per token, this many times k of the largest pre-activations are kept: nothing smaller is near a threshold."""


def to_half(weights: Weights) -> Weights:
    """The weights as the 16-bit file will hold them, in float32: thresholds and figures are of the shipped numbers."""
    return replace(weights, **{f.name: getattr(weights, f.name).half().float() for f in fields(weights)})


def pre_activations(weights: Weights, x: Tensor) -> Tensor:
    """(n, d_sae) before the threshold."""
    return (x.float() - weights.b_dec) @ weights.W_enc + weights.b_enc


@dataclass(frozen=True)
class Thresholded:
    """Weights with thresholds: what a Sae will compute, before there is one."""

    weights: Weights
    threshold: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """(n, d_sae), as `Sae.encode`."""
        return jump_relu(pre_activations(self.weights, x), self.threshold)

    def decode(self, latent_acts: Tensor) -> Tensor:
        """(n, d_in), as `Sae.decode`."""
        return latent_acts @ self.weights.W_dec + self.weights.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))


@torch.no_grad()
def thresholds(weights: Weights, acts: Sequence[Tensor], k: int) -> tuple[Tensor, Rule]:
    """Thresholds (d_sae,) with mean L0 = k on `acts` (tensors of (n, d_in)), by the rule that explains more variance.

    "global": one threshold for all latents, the k*n-th largest pre-activation. "per-latent": each latent fires as often
    as TopK made it fire; one that never made the top k stays silent on `acts`, at the global threshold or above.
    """
    values, latents = _largest(weights, acts, k)
    n = len(values)
    one = _quantised(values.flatten().sort(descending=True).values[: k * n + 1][-1].clamp(min=0.0))
    overall = torch.full_like(weights.b_enc, float(one))
    each = _per_latent(values, latents, k, overall)
    candidates: dict[Rule, Tensor] = {"global": overall, "per-latent": each}
    errors = {rule: _error(weights, threshold, acts) for rule, threshold in candidates.items()}
    best = min(errors, key=errors.__getitem__)
    return candidates[best], best


def _largest(weights: Weights, acts: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The KEPT*k largest pre-activations of each token and their latents, both (n, KEPT*k), sorted."""
    width = min(KEPT * k, len(weights.b_enc))
    found = [pre_activations(weights, x).topk(width, dim=-1) for x in _chunks(acts)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found]).to(
        torch.int32
    )


def _per_latent(values: Tensor, latents: Tensor, k: int, overall: Tensor) -> Tensor:
    """The c-th largest pre-activation of each latent, c being how often it is among a token's top k."""
    wins = torch.bincount(
        latents[:, :k].flatten()[values[:, :k].flatten() > 0].long(), minlength=len(overall)
    )
    order = values.flatten().argsort(descending=True)
    sorted_values, sorted_latents = values.flatten()[order], latents.flatten()[order].long()
    by_latent = sorted_latents.argsort(stable=True)
    counts = torch.bincount(sorted_latents, minlength=len(overall))
    starts = counts.cumsum(0) - counts
    ordered = sorted_values[by_latent]
    result = overall.clone()
    # The next smaller value is the threshold, because a latent fires where it *exceeds* it.
    has_next = (wins > 0) & (wins < counts)
    result[has_next] = ordered[(starts + wins)[has_next]]
    never = (wins == 0) & (counts > 0)
    result[never] = torch.maximum(overall[never], ordered[starts[never]])
    return _quantised(result.clamp(min=0.0))


def _error(weights: Weights, threshold: Tensor, acts: Sequence[Tensor]) -> float:
    total = 0.0
    for x in _chunks(acts):
        decoded = jump_relu(pre_activations(weights, x), threshold) @ weights.W_dec + weights.b_dec
        total += float((x.float() - decoded).pow(2).sum(dtype=torch.float64))
    return total


def _quantised(threshold: Tensor) -> Tensor:
    return threshold.half().float()


def _chunks(acts: Sequence[Tensor]) -> Iterable[Tensor]:
    for tensor in acts:
        yield from tensor.split(CHUNK)
