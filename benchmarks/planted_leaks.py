"""Leaks of a known size into one domain of text or into one relation, to see whether the monitor finds them.

A leak is a rank-one update that reads what sets the tokens of its scope apart and writes in a direction drawn by seed,
grown until it changes a given share of the scope's top-1 predictions, on text and prompts that the monitor does not
read. A domain's reading direction is the one along which its keys have most energy for that of all other domains'
keys: merely the domain's mean key, whitened, moves rarer kinds of text more than the domain itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor

from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.edits.keys import keys_at_subject
from guardedit.evaluation.guard.far_sample import FarSample
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.models.control import DOMAINS, control_texts
from guardedit.models.hooks import key_hook
from guardedit.pipeline import Guard
from guardedit.pipeline.measuring import risk_context
from guardedit.records import EditRequest
from guardedit.risk.compare import compare

SEED = 0
RELATION = "relation"
STEPS = 7
LARGEST = 16.0
"""In units of the rewrite module's own output at the scope's keys."""
RIDGE = 1e-2
KEYED, ASKED = 48, 120
"""Subjects of a relation whose mean key the leak is written at, and others that its size is measured on."""


@dataclass(frozen=True)
class Leaks:
    """Model, statistics and what leaks are sized on; a domain's leaks are the same behind every carrier."""

    guard: Guard
    pool: Neighbours
    n_tokens: int = 1024
    _kept: dict[tuple[str, float], tuple[EditDelta, float]] = field(default_factory=dict)
    _text: dict[str, FarSample] = field(default_factory=dict)

    def sized(self, scope: str, share: float, request: EditRequest) -> tuple[EditDelta, float]:
        """The leak that changes this share of the scope's top-1 predictions, and the share that it came to."""
        if scope == RELATION:
            return self._into_relation(share, request)
        if (scope, share) not in self._kept:
            self._kept[scope, share] = bisected(lambda size: self._into_text(scope, size), share)
        return self._kept[scope, share]

    def _into_text(self, domain: str, size: float) -> tuple[EditDelta, float]:
        made = self._rank_one(self._apart(domain), self._domain_keys[domain], size)
        return made, self._sample(domain).moves(made)[f"lost_top1/{domain}"]

    def _apart(self, domain: str) -> Float[Tensor, " d_in"]:
        """The direction u that maximises uᵀCu / uᵀC'u, C of the domain's keys and C' of all others'."""
        keys = self._domain_keys
        others = torch.cat([found for name, found in keys.items() if name != domain])
        own, rest = (k.T @ k / len(k) for k in (keys[domain], others))
        ridge = RIDGE * rest.diagonal().mean() * torch.eye(len(rest), dtype=rest.dtype)
        n = len(rest)
        _, vectors = eigh(own.numpy(), (rest + ridge).numpy(), subset_by_index=(n - 1, n - 1))
        return torch.from_numpy(vectors[:, 0])

    def _into_relation(self, share: float, request: EditRequest) -> tuple[EditDelta, float]:
        subjects = self.pool.around(request, SEED + 1)
        written, asked = subjects[:KEYED], subjects[KEYED : KEYED + ASKED]
        texts = [request.prompt.replace("{}", one) for one in written]
        keys = keys_at_subject(self.guard.handle, texts, written, self.guard.kit.layer).double()
        usual = self.guard.kit.second_moments[key_hook(self.guard.kit.layer)]
        reading = usual.solve(keys.mean(0)).cpu()
        prompts = [request.prompt.replace("{}", one) for one in asked]

        def made(size: float) -> tuple[EditDelta, float]:
            leak = self._rank_one(reading, keys, size)
            moved = compare(self.guard.handle, leak, prompts, ["near"] * len(prompts))
            return leak, sum(one.top_before != one.top_after for one in moved) / len(moved)

        return bisected(made, share)

    @cached_property
    def _domain_keys(self) -> dict[str, Float[Tensor, "n d_in"]]:
        bank = risk_context(self.guard).bank
        return {name: bank.of_domain(name).double() for name in DOMAINS}

    def _sample(self, domain: str) -> FarSample:
        """Control text's calibration half: the monitor reads the other."""
        if domain not in self._text:
            handle = self.guard.handle
            texts = {domain: control_texts(handle, domain, 2 * self.n_tokens, SEED, half="calibrate")}
            self._text[domain] = FarSample.only(handle, self.guard.kit.layer, SEED, texts, self.n_tokens)
        return self._text[domain]

    def _rank_one(
        self, reading: Float[Tensor, " d_in"], keys: Float[Tensor, "n d_in"], size: float
    ) -> EditDelta:
        """`size` is the mean push at `keys`, in units of the module's mean output there."""
        handle, layer = self.guard.handle, self.guard.kit.layer
        noise = torch.Generator().manual_seed(SEED)
        weight = handle.weight(layer).detach().double().cpu()
        direction = torch.randn(weight.shape[0], generator=noise, dtype=torch.float64)
        left = size * (keys @ weight.T).norm(dim=1).mean() * direction / direction.norm()
        right = reading / (keys @ reading).pow(2).mean().sqrt()
        change = WeightChange(handle.rewrite_parameter(layer), layer, LowRank(left[:, None], right[None, :]))
        return EditDelta((change,), "planted", {"size": size}, {})


def bisected(make: Callable[[float], tuple[EditDelta, float]], share: float) -> tuple[EditDelta, float]:
    """Of the sizes that geometric bisection tries, the leak whose share comes nearest."""
    low, high = LARGEST / 1024, LARGEST
    tried: list[tuple[EditDelta, float]] = []
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        tried.append(make(middle))
        low, high = (middle, high) if tried[-1][1] < share else (low, middle)
    return min(tried, key=lambda one: abs(one[1] - share))


def both(carrier: EditDelta, leak: EditDelta) -> EditDelta:
    """The carrier's update and the leak's as one."""
    (one,), (two,) = carrier.changes, leak.changes
    if not (isinstance(one, WeightChange) and isinstance(two, WeightChange)):
        raise SystemExit("a carrier is a change of one rewrite module")
    if not (isinstance(one.update, LowRank) and isinstance(two.update, LowRank)):
        raise SystemExit("a carrier is of low rank")
    left = torch.cat([one.update.left.double(), two.update.left], 1)
    right = torch.cat([one.update.right.double(), two.update.right], 0)
    return replace(carrier, changes=(replace(one, update=LowRank(left, right)),))
