"""Leaks of a known size into one domain of text or into one relation, to see whether the monitor finds them.

A leak is a rank-one update that reads what sets the tokens of its scope apart and writes in a direction drawn by seed,
grown until it changes a given share of the scope's top-1 predictions, on text and prompts that the monitor does not
read. A domain's reading direction is the one along which its keys have most energy for that of all other domains'
keys: merely the domain's mean key, whitened, moves rarer kinds of text more than the domain itself. That leak is thin:
it changes predictions that were nearly another one anyway. A *narrow* one reads one kind of the domain's tokens only
(a cluster of its keys) and changes most of what is said there, whatever that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from sklearn.cluster import KMeans
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
NARROW = ", narrow"
"""Ends the name of a domain's narrow leaks."""
KINDS = 24
"""Clusters of a domain's keys, for narrow leaks."""
STEPS = 7
LARGEST = 16.0
"""In units of the rewrite module's own output at the scope's keys."""
RIDGE = 1e-2
FEWEST, KEYED = 30, 1 / 3
"""Subjects of a relation that a leak into it needs; share of them whose mean key the leak is written at. Its size is
measured on the others."""


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
            self._kept[scope, share] = self._into_text(scope, share)
        return self._kept[scope, share]

    def fits(self, scope: str, request: EditRequest) -> bool:
        """Whether the scope is large enough for a leak."""
        return scope != RELATION or len(self.pool.around(request, SEED + 1)) >= FEWEST

    def _into_text(self, scope: str, share: float) -> tuple[EditDelta, float]:
        domain = domain_of(scope)
        reading, keys = self._narrow(domain, share) if scope.endswith(NARROW) else self._spread(domain)
        sample = self._sample(domain)

        def made(size: float) -> tuple[EditDelta, float]:
            leak = self._rank_one(reading, keys, size)
            return leak, sample.moves(leak)[f"lost_top1/{domain}"]

        return bisected(made, share)

    def _spread(self, domain: str) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "n d_in"]]:
        """What sets the domain apart, and all its keys."""
        reading, _ = apart(self._domain_keys[domain], self._other_keys(domain))
        return reading, self._domain_keys[domain]

    def _narrow(self, domain: str, share: float) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "n d_in"]]:
        """What best sets one kind of the domain's tokens apart, and that kind's keys: `share` to 4 x `share` of all."""
        keys, others = self._domain_keys[domain], self._other_keys(domain)
        kinds = torch.from_numpy(KMeans(KINDS, n_init=1, random_state=SEED).fit_predict(keys.numpy()))
        members = [
            kinds == kind for kind in range(KINDS) if share <= (kinds == kind).double().mean() <= 4 * share
        ]
        if not members:
            raise SystemExit(f"no kind of {domain} tokens makes up {share:g} to {4 * share:g} of its keys")
        found = [(*apart(keys[own], torch.cat([keys[~own], others])), own) for own in members]
        reading, _, own = max(found, key=lambda one: one[1])
        return reading, keys[own]

    def _other_keys(self, domain: str) -> Float[Tensor, "n d_in"]:
        return torch.cat([found for name, found in self._domain_keys.items() if name != domain])

    def _into_relation(self, share: float, request: EditRequest) -> tuple[EditDelta, float]:
        subjects = self.pool.around(request, SEED + 1)
        keyed = round(KEYED * len(subjects))
        written, asked = subjects[:keyed], subjects[keyed:]
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


def domain_of(scope: str) -> str:
    """The domain that a leak of this name goes into; a relation's is its own."""
    return scope.removesuffix(NARROW)


def apart(
    own: Float[Tensor, "n d_in"], others: Float[Tensor, "m d_in"]
) -> tuple[Float[Tensor, " d_in"], float]:
    """The direction u that maximises uᵀCu / uᵀC'u, C of its own keys and C' of the others', and that ratio."""
    mine, rest = (k.T @ k / len(k) for k in (own, others))
    n = len(rest)
    ridge = RIDGE * rest.diagonal().mean() * torch.eye(n, dtype=rest.dtype)
    values, vectors = eigh(mine.numpy(), (rest + ridge).numpy(), subset_by_index=(n - 1, n - 1))
    return torch.from_numpy(vectors[:, 0]), float(values[0])


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
