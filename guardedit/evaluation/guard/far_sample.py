"""Far damage of one edit after another, cheaply: logits at every third position of control text; unedited side once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.drift.probes import Rows, far_rows
from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.models.control import DOMAINS, control_texts
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import record, resume
from guardedit.models.installed import whole_from

EVERY = 3
"""Of a row's positions, one in three is looked at."""
TOKENS = 320
"""Of each domain."""


@dataclass(frozen=True, eq=False)
class FarBatch:
    """A batch of rows with the unedited model's answers."""

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    entered: Float[Tensor, "batch seq d_model"]
    """Residual stream before block `start`, which no edit at or above it moves."""
    logprobs: Float[Tensor, "n vocab"]
    """At the positions looked at, nats, float32."""
    following: Int[Tensor, " n"]
    """The token that really comes next."""
    domains: tuple[str, ...]
    """Of each position looked at."""


@dataclass(frozen=True, eq=False)
class FarSample:
    """Control text read by the unedited model, for edits at `start` and above."""

    handle: ModelHandle
    start: int
    batches: tuple[FarBatch, ...]
    digest: str

    @classmethod
    def of(
        cls,
        handle: ModelHandle,
        start: int,
        seed: int = 0,
        more: Mapping[str, Sequence[str]] | None = None,
        n_tokens: int = TOKENS,
    ) -> FarSample:
        """The shipped control text's test half, and `more` texts by domain; `start` is the lowest layer edited."""
        texts = {name: control_texts(handle, name, 2 * n_tokens, seed, half="test") for name in DOMAINS}
        return cls.only(handle, start, seed, texts | dict(more or {}), n_tokens)

    @classmethod
    def only(
        cls,
        handle: ModelHandle,
        start: int,
        seed: int,
        texts: Mapping[str, Sequence[str]],
        n_tokens: int = TOKENS,
    ) -> FarSample:
        """The same of these texts, by domain, and no others."""
        start = whole_from(handle, start)
        rows, _ = far_rows(handle, n_tokens * len(texts), seed, texts)
        return cls(handle, start, tuple(_read(handle, rows, start)), rows.digest)

    @torch.no_grad()
    def moves(self, delta: EditDelta) -> dict[str, float]:
        """Mean `kl_nats`, `lost_top1` and `nll_gain_nats` by domain and over the domains (each counts the same)."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        with preserved(self.handle), rehearsed(self.handle, delta):
            for batch in self.batches:
                for domain, moved in zip(batch.domains, self._moved(batch), strict=True):
                    found.setdefault(domain, []).append(moved)
        return _means(found)

    def _moved(self, batch: FarBatch) -> list[tuple[float, float, float]]:
        with resume(self.handle, self.start, batch.entered):
            hidden = self.handle.hidden(batch.ids, batch.mask)
        after = self.handle.logits_at(hidden, looked_at(batch.mask)).log_softmax(-1)
        before = batch.logprobs
        kl = (before.exp() * (before - after)).double().sum(-1).clamp_min(0)
        lost = (before.argmax(-1) != after.argmax(-1)).double()
        at = batch.following[:, None]
        gain = (before.gather(1, at) - after.gather(1, at)).double().squeeze(1)
        if not bool(torch.isfinite(kl).all()):
            raise FloatingPointError("a far prediction came out as NaN or infinite")
        return list(zip(kl.tolist(), lost.tolist(), gain.tolist(), strict=True))


def looked_at(mask: Int[Tensor, "batch seq"]) -> Tensor:
    """Every third position of each row that is followed by another real token, the row's first left out."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places % EVERY == EVERY - 1)[None, :] & (places[None, :] < mask.sum(1, keepdim=True) - 1)


@torch.no_grad()
def _read(handle: ModelHandle, rows: Rows, start: int) -> Iterator[FarBatch]:
    name, left = f"blocks.{start}.hook_resid_pre", list(rows.domains)
    for ids, mask in rows.batches:
        with preserved(handle), record(handle, [name]) as seen:
            hidden = handle.hidden(ids, mask)
        chosen = looked_at(mask)
        logprobs = handle.logits_at(hidden, chosen).log_softmax(-1)
        here, left = left[: len(ids)], left[len(ids) :]
        domains = tuple(d for d, n in zip(here, chosen.sum(1).tolist(), strict=True) for _ in range(n))
        following = ids.roll(-1, 1)[chosen]
        yield FarBatch(ids, mask, seen[name], logprobs, following, domains)


def _means(found: Mapping[str, Sequence[tuple[float, float, float]]]) -> dict[str, float]:
    names = ("kl_nats", "lost_top1", "nll_gain_nats")
    by_domain = {
        domain: [math.fsum(column) / len(column) for column in zip(*moved, strict=True)]
        for domain, moved in found.items()
    }
    means = {f"{name}/{d}": values[i] for d, values in by_domain.items() for i, name in enumerate(names)}
    whole = {
        name: math.fsum(values[i] for values in by_domain.values()) / len(by_domain)
        for i, name in enumerate(names)
    }
    return whole | means
