"""One pass over one group of rows: predictions, latents and raw activations of both sides, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guardedit.drift import behaviour, latents
from guardedit.drift.cache import Recorded
from guardedit.drift.probes import Rows, last_positions
from guardedit.drift.sides import BaseSide, Progress, edited_side, used
from guardedit.models.handle import ModelHandle

if TYPE_CHECKING:
    from guardedit.saes.checkpoints import Sae


@dataclass
class Spread:
    """Running sums of ‖x − x̂‖² and of the variance of x, for one side at one hook."""

    error: float = 0.0
    square: float = 0.0
    total: Tensor | None = None
    n: int = 0

    def add(self, x: Float[Tensor, "n d"], reconstruction: Float[Tensor, "n d"]) -> None:
        """Take in tokens."""
        wide = x.double()
        self.error += float((wide - reconstruction.double()).square().sum())
        self.square += float(wide.square().sum())
        self.total = wide.sum(0) if self.total is None else self.total + wide.sum(0)
        self.n += len(x)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN without tokens or variance."""
        if self.total is None:
            return math.nan
        variance = self.square - float(self.total.square().sum()) / self.n
        return self.error / variance if variance > 0 else math.nan


@dataclass
class HookDrift:
    """One hook over one group of rows."""

    moved: float = 0.0
    """Σ‖x' − x‖² over tokens."""
    square: float = 0.0
    finite: bool = True
    before: Spread = field(default_factory=Spread)
    after: Spread = field(default_factory=Spread)
    counts: list[latents.Counts] = field(default_factory=list)
    means: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per batch, mean latent activations of each sequence, before and after."""

    @property
    def shift(self) -> float:
        """Relative L2 change of the activations."""
        return math.sqrt(self.moved / self.square) if self.square else math.nan


@dataclass
class Observation:
    """Both sides of one group of rows."""

    rows: Rows
    positions: behaviour.Positions
    hooks: dict[str, HookDrift]

    @property
    def n_counted(self) -> int:
        """Tokens behind the latents' statistics at the hook that leaves out most."""
        totals = [sum(float(c.tokens.sum()) for c in h.counts) for h in self.hooks.values() if h.counts]
        return int(min(totals, default=0))


def observe(
    handle: ModelHandle,
    base: BaseSide,
    rows: Rows,
    heads: tuple[nn.Module, nn.Module],
    saes: Mapping[str, Sae],
    progress: Progress | None = None,
) -> Observation:
    """Run the edited model over `rows` and compare as it goes; nothing of the edited side is kept."""
    parts: list[behaviour.Positions] = []
    hooks = {name: HookDrift() for name in base.hook_names}
    done = 0
    for (input_ids, mask), before, after in edited_side(handle, base, rows, progress):
        sequence = torch.arange(done, done + len(mask))[:, None].expand_as(mask)
        where = mask.bool() if rows.name == "far" else last_positions(mask)
        following = _following(input_ids, mask, rows.name)
        parts.append(
            behaviour.compare(
                before.final, after.final, heads, following[where], sequence[where.cpu()], handle.capped
            )
        )
        for name, drift in hooks.items():
            _add(drift, before, after, name, mask, base.norm_limits[name], saes.get(name))
        done += len(mask)
    return Observation(rows, _on_cpu(behaviour.joined(parts)), hooks)


def _following(input_ids: Tensor, mask: Tensor, name: str) -> Tensor:
    """The next real token of each position, −1 at the end of a row and in prompts, whose continuation is not given."""
    following = torch.full_like(input_ids, -1)
    if name == "far":
        following[:, :-1] = torch.where(mask[:, 1:].bool(), input_ids[:, 1:], -1)
    return following


def _add(
    drift: HookDrift,
    before: Recorded,
    after: Recorded,
    name: str,
    mask: Tensor,
    limit: float,
    sae: Sae | None,
) -> None:
    """Take in one batch at one hook."""
    x, y = before.acts[name], after.acts[name]
    counted = used(mask) & (x.norm(dim=-1) <= limit)
    drift.finite &= bool(torch.isfinite(y[mask.bool()]).all())
    drift.moved += float((y - x)[counted].double().square().sum())
    drift.square += float(x[counted].double().square().sum())
    if sae is not None and drift.finite:
        _encode(drift, x, y, counted, sae)


def _encode(drift: HookDrift, x: Tensor, y: Tensor, counted: Bool[Tensor, "batch seq"], sae: Sae) -> None:
    codes = sae.encode(x), sae.encode(y)
    drift.counts.append(latents.count(*codes, counted))
    weight = counted.unsqueeze(-1) / counted.sum(1).clamp(min=1)[:, None, None]
    drift.means.append(((codes[0] * weight).sum(1), (codes[1] * weight).sum(1)))
    drift.before.add(x[counted], sae.decode(codes[0][counted]))
    drift.after.add(y[counted], sae.decode(codes[1][counted]))


def _on_cpu(positions: behaviour.Positions) -> behaviour.Positions:
    fields: Sequence[str] = tuple(behaviour.Positions.__dataclass_fields__)
    return behaviour.Positions(**{name: getattr(positions, name).cpu() for name in fields})
