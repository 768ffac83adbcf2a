"""Figures of the quality card. Everything is measured on inlier tokens without position 0, on text not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from guardedit.errors import TooFewTokensError
from guardedit.saes.batches import inliers
from guardedit.saes.gather import OUTLIER

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle
    from guardedit.saes.gather import Store

CHUNK = 2048
Reconstruct = Callable[[Tensor], Tensor]


class Coder(Protocol):
    """What is graded: a Sae, or a control."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, latent_acts: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class HeldOut:
    """Held-out activations of one hook by domain."""

    by_domain: dict[str, Tensor]
    """Domain -> (n, d_in), inliers only."""
    unseen: tuple[str, ...]
    """Domains that training has no text of."""

    @property
    def seen(self) -> Tensor:
        """(n, d_in) of the training domains."""
        return torch.cat([x for name, x in self.by_domain.items() if name not in self.unseen])


def held_out(store: Store, hook_name: str, train_domains: Sequence[str]) -> HeldOut:
    """Inlier activations of a store by domain."""
    found: dict[str, list[Tensor]] = {}
    domain_of = torch.tensor(store.rows.domain_of)
    for shard in store.available(hook_name):
        loaded = store.load(hook_name, shard)
        rows = loaded["row"].long()
        for index, name in enumerate(store.rows.domains):
            chosen = loaded["acts"][loaded["inliers"] & (domain_of[rows] == index)]
            if len(chosen):
                found.setdefault(name, []).append(chosen)
    by_domain = {name: torch.cat(parts) for name, parts in sorted(found.items())}
    return HeldOut(by_domain, tuple(name for name in by_domain if name not in train_domains))


@torch.no_grad()
def explained_variance(reconstruct: Reconstruct, x: Tensor) -> float:
    """1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2 over tokens x (n, d_in); at most 1, 0 for the mean, no lower bound."""
    if len(x) < 2:
        raise TooFewTokensError("explained variance needs at least two tokens")
    mean = x.mean(0, dtype=torch.float32)
    error = variance = 0.0
    for part in x.split(CHUNK):
        raw = part.float()
        error += float((raw - reconstruct(raw)).pow(2).sum(dtype=torch.float64))
        variance += float((raw - mean).pow(2).sum(dtype=torch.float64))
    return 1.0 - error / variance


def explained_variance_by_domain(reconstruct: Reconstruct, data: HeldOut) -> dict[str, float]:
    """`explained_variance` of each domain, "all" (training domains pooled) and "unseen" (the others pooled)."""
    result = {"all": explained_variance(reconstruct, data.seen)}
    if data.unseen:
        result["unseen"] = explained_variance(
            reconstruct, torch.cat([data.by_domain[name] for name in data.unseen])
        )
    for name, x in data.by_domain.items():
        if len(x) > 1:
            result[name] = explained_variance(reconstruct, x)
    return {name: round(value, 4) for name, value in result.items()}


@torch.no_grad()
def mean_l0(coder: Coder, x: Tensor) -> float:
    """Mean number of active latents a token."""
    return sum(float((coder.encode(part.float()) > 0).sum()) for part in x.split(CHUNK)) / len(x)


@dataclass(frozen=True)
class LatentStatistics:
    """Over training tokens; all (d_sae,) but `top_*` (d_sae, 64), sorted, the strongest tokens of each latent."""

    energy: Tensor
    firing_rate: Tensor
    top_values: Tensor
    top_tokens: Tensor
    n_tokens: int

    @property
    def dead_share(self) -> float:
        """Latents that never fired."""
        return float((self.firing_rate == 0).float().mean())

    @property
    def dense_share(self) -> float:
        """Latents that fired on more than 10 % of the tokens."""
        return float((self.firing_rate > 0.1).float().mean())


@torch.no_grad()
def latent_statistics(
    coder: Coder, store: Store, hook_name: str, max_shards: int = 16, top: int = 64
) -> LatentStatistics:
    """Energy E[a_f^2], firing rate and strongest tokens of each latent over up to `max_shards` shards."""
    total: dict[str, Tensor] = {}
    best: tuple[Tensor, Tensor] | None = None
    n = 0
    for shard in store.available(hook_name)[:max_shards]:
        loaded = store.load(hook_name, shard)
        keep = loaded["inliers"]
        ids = _token_ids(store, loaded["row"][keep], loaded["position"][keep])
        for x, tokens in zip(loaded["acts"][keep].split(CHUNK), ids.split(CHUNK), strict=True):
            acts = coder.encode(x.float())
            for name, part in (
                ("energy", acts.double().pow(2).sum(0)),
                ("fired", (acts > 0).double().sum(0)),
            ):
                total[name] = total.get(name, torch.zeros_like(part)) + part
            best = _strongest(best, acts, tokens, top)
            n += len(x)
    if best is None:
        raise TooFewTokensError(f"no activations of {hook_name} to take statistics of")
    return LatentStatistics(
        (total["energy"] / n).float(), (total["fired"] / n).float(), best[0].T, best[1].T, n
    )


def _token_ids(store: Store, row: Tensor, position: Tensor) -> Tensor:
    return torch.tensor(
        [int(store.rows.ids[r][p]) for r, p in zip(row.tolist(), position.tolist(), strict=True)]
    )


def _strongest(
    best: tuple[Tensor, Tensor] | None, acts: Tensor, tokens: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Merge a chunk's (n, d_sae) into the strongest (top, d_sae) so far."""
    values, where = acts.topk(min(top, len(acts)), dim=0)
    ids = tokens[where]
    if best is not None:
        values, ids = torch.cat([best[0], values]), torch.cat([best[1], ids])
    order = values.topk(min(top, len(values)), dim=0)
    return order.values, ids.gather(0, order.indices)


def second_moment(store: Store, hook_name: str, max_shards: int = 16) -> tuple[Tensor, Tensor]:
    """E[x x^T] (d, d) and E[x] (d,), float64, over the inliers of up to `max_shards` shards."""
    products: Tensor | None = None
    sums: Tensor | None = None
    n = 0
    for shard in store.available(hook_name)[:max_shards]:
        for part in inliers(store, hook_name, shard).split(CHUNK):
            x = part.float()
            products = (x.T @ x).double() + (0 if products is None else products)
            sums = x.sum(0, dtype=torch.float64) + (0 if sums is None else sums)
            n += len(x)
    if products is None or sums is None:
        raise TooFewTokensError(f"no activations of {hook_name} to take moments of")
    return products / n, sums / n


def pca_reconstruction(moment: Tensor, mean: Tensor, components: int) -> Reconstruct:
    """Projection on the `components` leading principal axes: the control with as many numbers a token."""
    vectors = torch.linalg.eigh(moment - torch.outer(mean, mean)).eigenvectors[:, -components:].float()
    centre = mean.float()
    return lambda x: (x - centre) @ vectors @ vectors.T + centre


@torch.no_grad()
def leakage_share(coder: Coder, moment: Tensor, keys: Tensor, x: Tensor) -> tuple[float, float]:
    """How much of an edit's leakage the autoencoder explains; median over facts, of two figures.

    A rank-one edit with key k moves a token x by p(x) r, with p(x) = k^T C^-1 x / k^T C^-1 k, so its leakage is
    proportional to E[p(x)^2]. With x_hat the reconstruction of x, over held-out tokens:
    share = E[p(x_hat) p(x)] / E[p(x)^2] (1: all of it is in latents; it can exceed 1 or be negative), and
    variance explained = 1 - E[(p(x) - p(x_hat))^2] / E[p(x)^2]. `keys` is (n_facts, d_in), `moment` C is (d_in, d_in),
    `x` is (n, d_in).
    """
    ridge = 1e-6 * torch.trace(moment) / len(moment) * torch.eye(len(moment), dtype=torch.float64)
    solved = torch.cholesky_solve(keys.double().T, torch.linalg.cholesky(moment + ridge))
    directions = (solved / (keys.double() * solved.T).sum(-1)).float()
    cross = square = rest = torch.zeros(len(keys), dtype=torch.float64)
    for part in x.split(CHUNK):
        raw = part.float()
        p, p_hat = raw @ directions, coder.decode(coder.encode(raw)) @ directions
        cross = cross + (p * p_hat).sum(0, dtype=torch.float64)
        square = square + p.pow(2).sum(0, dtype=torch.float64)
        rest = rest + (p - p_hat).pow(2).sum(0, dtype=torch.float64)
    return float((cross / square).median()), float((1 - rest / square).median())


@torch.no_grad()
def ce_recovered(
    handle: ModelHandle,
    hook_name: str,
    coder: Coder,
    mean: Tensor,
    median_norm: float,
    rows: Sequence[Sequence[int]],
) -> tuple[float, dict[str, float]]:
    """Loss recovered against mean ablation, and the three cross-entropies in nats a token.

    (CE_mean - CE_spliced) / (CE_mean - CE_original): 1 when splicing the reconstruction in changes nothing, 0 when it
    is as bad as the mean activation. Only what the autoencoder is for is replaced: inlier tokens after position 0.
    """

    def splice(reconstruct: Reconstruct) -> Reconstruct:
        def replace(activation: Tensor) -> Tensor:
            x = activation.float()
            keep = x.norm(dim=-1, keepdim=True) > OUTLIER * median_norm
            keep[:, 0] = True
            return torch.where(keep, x, reconstruct(x)).to(activation.dtype)

        return replace

    changes: dict[str, Reconstruct | None] = {
        "original": None,
        "spliced": splice(lambda x: coder.decode(coder.encode(x))),
        "mean_ablated": splice(lambda x: mean.expand_as(x)),
    }
    nats = {name: _cross_entropy(handle, hook_name, change, rows) for name, change in changes.items()}
    gap = nats["mean_ablated"] - nats["original"]
    recovered = (nats["mean_ablated"] - nats["spliced"]) / gap if gap > 0 else float("nan")
    return recovered, {name: round(value, 4) for name, value in nats.items()}


def _cross_entropy(
    handle: ModelHandle, hook_name: str, change: Reconstruct | None, rows: Iterable[Sequence[int]]
) -> float:
    from contextlib import nullcontext

    from guardedit.models.hooks import patch

    total, n = 0.0, 0
    with nullcontext() if change is None else patch(handle, hook_name, change):
        for row in rows:
            ids = torch.as_tensor(row, dtype=torch.long, device=handle.device)[None]
            hidden = handle.hidden(ids, torch.ones_like(ids))
            logits = handle.logits_at(hidden[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool)).float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            n += ids.shape[1] - 1
    return total / n
