"""An endless, seeded stream of normalised activations out of a store; the same stream after a restart."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guardedit.errors import TooFewTokensError

if TYPE_CHECKING:
    from guardedit.saes.gather import Store

SHARDS_IN_MEMORY = 8
"""Shards mixed with each other at a time: tokens of a shard come from many documents, a batch from many shards."""


@dataclass(frozen=True)
class Normalisation:
    """x -> (x - mean) / scale: zero mean, mean squared norm d_in, over inlier tokens."""

    mean: Tensor
    """(d_in,) float32."""
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """Normalised (n, d_in), float32."""
        return (x.float() - self.mean) / self.scale


def inliers(store: Store, hook_name: str, shard: int) -> Tensor:
    """Inlier activations (n, d_in) of one shard, float16."""
    loaded = store.load(hook_name, shard)
    return loaded["acts"][loaded["inliers"]]


def all_inliers(store: Store, hook_name: str) -> list[Tensor]:
    """`inliers` of every shard there is."""
    return [inliers(store, hook_name, shard) for shard in store.available(hook_name)]


def normalisation(store: Store, hook_name: str, shards: Sequence[int]) -> Normalisation:
    """Mean and scale from the first four shards."""
    acts = torch.cat([inliers(store, hook_name, shard) for shard in shards[:4]]).float()
    if not len(acts):
        raise TooFewTokensError(f"no activations of {hook_name} to train on")
    mean = acts.mean(0)
    return Normalisation(mean, float((acts - mean).pow(2).mean().sqrt()))


def stream(
    store: Store,
    hook_name: str,
    shards: Sequence[int],
    normal: Normalisation,
    batch_size: int,
    seed: int,
    skip: int = 0,
) -> Iterator[Tensor]:
    """Batches (batch_size, d_in) without end, in an order that the seed fixes; the first `skip` ones are left out.

    Each epoch shuffles the shards, then the tokens within groups of SHARDS_IN_MEMORY shards. The tail of a group that
    does not fill a batch is dropped.
    """
    for epoch in itertools.count():
        order = list(shards)
        random.Random(f"{seed} {epoch}").shuffle(order)
        yielded = False
        for start in range(0, len(order), SHARDS_IN_MEMORY):
            group = torch.cat([inliers(store, hook_name, s) for s in order[start : start + SHARDS_IN_MEMORY]])
            generator = torch.Generator().manual_seed(
                random.Random(f"{seed} {epoch} {start}").getrandbits(62)
            )
            shuffled = torch.randperm(len(group), generator=generator)
            for chunk in shuffled.split(batch_size):
                if len(chunk) < batch_size:
                    break
                yielded = True
                if skip:
                    skip -= 1
                    continue
                yield normal.apply(group[chunk])
        if not yielded:
            raise TooFewTokensError(f"{hook_name}: no group of shards fills one batch of {batch_size} tokens")
