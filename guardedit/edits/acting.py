"""An activation edit at work in one forward pass: its gate is settled once, then its rule picks positions.

Nothing is computed for rows that cannot be moved, and an activation that is not moved is handed on as the same object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardedit.edits.activation_parts import Action, Gate, KeyMatch, Move, TokenMatch, Where, placed
from guardedit.errors import BadRequestError
from guardedit.models.hooks import HookPoint
from guardedit.models.passes import Held, Pass
from guardedit.models.turns import ends_of

if TYPE_CHECKING:
    from guardedit.edits.activations import ActivationChange


class Acting:
    """An installed edit: begins anew in every pass."""

    def __init__(self, change: ActivationChange) -> None:
        self.change = change
        self.parameter, self.data = change.parameter, change.data
        self.looks_at, self.acts_at, self.looks_ahead = change.looks_at, change.acts_at, change.looks_ahead
        self.gate_at = change.gate_at
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Action, Where, Gate | None]] = {}

    def begin(self, facts: Pass) -> InPass:
        """The edit in one pass."""
        return InPass(self, facts)

    def parts(self, x: Tensor) -> tuple[Action, Where, Gate | None]:
        """Action, rule and gate where `x` lies, in float32 at least."""
        key = (x.device, torch.promote_types(x.dtype, torch.float32))
        if key not in self._placed:
            change = self.change
            gate = None if change.gate is None else placed(change.gate, *key)
            self._placed[key] = placed(change.action, *key), placed(change.where, *key), gate
        return self._placed[key]


class InPass:
    """One edit in one pass."""

    def __init__(self, edit: Acting, facts: Pass) -> None:
        self._edit, self._change, self._name, self._facts = edit, edit.change, edit.parameter, facts
        self._where: Bool[Tensor, "rows seq"] | None = None
        """Positions that the rule picks; None for all."""
        self._fires: Bool[Tensor, "rows _"] | None = None
        """Rows, or positions, whose gate fires; None for all."""
        self._decision: Held | None = None
        self.settled = self.silent = False
        self._begin()

    def _begin(self) -> None:
        """What follows from the tokens alone."""
        change, facts = self._change, self._facts
        if isinstance(change.where, TokenMatch):
            self._where = self._tokens(change.where)
            self.silent = self._where is None
        if change.gate is None:
            self.settled = True
        elif self.silent:
            self.settled = True
            if facts.decides is not None:
                self._decision = Held(torch.zeros_like(facts.ids[:, 0], dtype=torch.bool), False)
        elif facts.decides is None:
            self.settled = True
            held = facts.held_for(self._name)
            self.silent = held is None
            self._fires = None if held is None else held[:, None]

    def _tokens(self, where: TokenMatch) -> Tensor | None:
        """Positions where a sequence ends; None where there is none: an answer's tokens match nothing."""
        if self._facts.decides is None:
            return None
        found = ends_of(self._facts.ids, where.sequences) & self._facts.decides
        return found if bool(found.any()) else None

    def look(self, point: HookPoint, activation: Float[Tensor, "rows seq d"], given: Tensor) -> None:
        """Settle the gate, or find the positions whose key matches; the key comes last."""
        if not self.settled and point == self._edit.gate_at:
            self._settle(activation)
        matches = isinstance(self._change.where, KeyMatch) and point in self._edit.looks_at[-1:]
        if matches and not self.silent:
            self._match(given)

    def _settle(self, activation: Tensor) -> None:
        """Each row's decision, or each segment's where a row has several; rows without a position to move have none."""
        gate, facts = self._edit.parts(activation)[2], self._facts
        if gate is None:
            return
        rows = slice(None) if self._where is None else self._where.any(1)
        here = rows if isinstance(rows, slice) else rows.to(activation.device)
        found = torch.zeros_like(facts.ids, dtype=torch.bool)
        found[rows] = decide(gate, activation[here], facts, self._name, rows)
        self.settled, self._fires = True, found
        self._decision = Held.of(found[:, -1])
        self.silent = not bool(found.any())

    def _match(self, key: Float[Tensor, "rows seq d_in"]) -> None:
        where = self._edit.parts(key)[1]
        if not isinstance(where, KeyMatch):
            return
        rows = slice(None) if self._fires is None else self._fires.any(1).to(key.device)
        wide = torch.promote_types(key.dtype, torch.float32)
        found = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
        found[rows] = key[rows].detach().to(wide) @ where.read_out >= where.least
        self._where, self.silent = found, not bool(found.any())

    def act(self, activation: Float[Tensor, "rows seq d"], given: Tensor) -> Float[Tensor, "rows seq d"]:
        """The activation with the picked positions moved; the same object where there are none."""
        if not self.settled:
            raise BadRequestError(
                f"the gate of {self._name} was not reached in this forward pass; run it from block "
                f"{self._change.lowest_layer} or below"
            )
        if self.silent:
            return activation
        device = activation.device
        moved = self._facts.real.to(device)
        for mask in (self._where, self._fires):
            moved = moved if mask is None else moved & mask.to(device)
        at = moved.nonzero(as_tuple=True)
        if not len(at[0]):
            return activation
        return activation.index_put(at, self._moved(activation[at], given, at))

    def _moved(
        self, activation: Float[Tensor, "n d"], given: Tensor, at: tuple[Tensor, ...]
    ) -> Float[Tensor, "n d"]:
        action = self._edit.parts(activation)[0]
        if isinstance(action, Move):
            return activation + action.update.move(given[at]).to(activation.device)
        pushed = action.beta * activation.to(action.direction.dtype) + action.direction
        return pushed.to(activation.dtype)

    def decision(self) -> Held | None:
        """What to remember beside the cache; None where the pass decided nothing."""
        return self._decision


def decide(
    gate: Gate, activation: Float[Tensor, "rows seq d"], facts: Pass, name: str, rows: Tensor | slice
) -> Bool[Tensor, "rows seq"]:
    """Where a gate fires, by segment; a segment without a deciding position keeps what stands before it.

    activation: that of the pass's `rows`.
    """
    ids = facts.ids[rows]
    decides = facts.decides[rows].to(activation.device) if facts.decides is not None else ids >= 0
    segments = torch.zeros_like(ids) if facts.segments is None else facts.segments[rows]
    segments = segments.to(activation.device)
    n_segments = 1 if facts.segments is None else int(segments.max()) + 1
    if not facts.cached:
        decides = _without_first(ids.to(decides.device), decides, segments, n_segments)
    counts = _counts(decides, segments, n_segments)
    pooled = _pooled(gate, activation.detach(), decides, segments, counts)
    fires, known = gate.logit(pooled) >= gate.limit, counts > 0
    held = facts.held_for(name)
    before = torch.zeros_like(known[:, 0]) if held is None else held[rows].to(known.device)
    return _carried(fires, known, before).gather(1, segments).to(facts.ids.device)


def _without_first(
    ids: Tensor, decides: Tensor, segments: Tensor, n_segments: int
) -> Bool[Tensor, "rows seq"]:
    """The deciding positions but for a row's first token, where its segment has others."""
    real = ids >= 0
    first = decides & real & (real.long().cumsum(1) == 1)
    alone = _counts(decides, segments, n_segments).gather(1, segments) == 1
    return decides & ~(first & ~alone)


def _counts(decides: Tensor, segments: Tensor, n_segments: int) -> Int[Tensor, "rows segments"]:
    """Deciding positions of each segment."""
    zeros = torch.zeros(len(decides), n_segments, dtype=torch.long, device=decides.device)
    return zeros.scatter_add(1, segments, decides.long())


def _pooled(
    gate: Gate, activation: Tensor, decides: Tensor, segments: Tensor, counts: Tensor
) -> Float[Tensor, "rows segments latents"]:
    """The largest, or the mean, of each latent over each segment's deciding positions; 0 where there is none."""
    acts = gate.latent_acts(activation)
    where = segments[..., None].expand_as(acts)
    shape = (*counts.shape, acts.shape[-1])
    if gate.pool == "mean":
        sums = acts.new_zeros(shape).scatter_add(1, where, acts.masked_fill(~decides[..., None], 0.0))
        return torch.div(sums, counts.clamp(min=1)[..., None])
    acts = acts.masked_fill(~decides[..., None], -torch.inf)
    largest = acts.new_full(shape, -torch.inf).scatter_reduce(1, where, acts, "amax")
    return largest.masked_fill(counts[..., None] == 0, 0.0)


def _carried(fires: Tensor, known: Tensor, before: Tensor) -> Bool[Tensor, "rows segments"]:
    """Each segment's decision, or that of the last one before it that has one; `before` all of them is what is held."""
    if fires.shape[1] == 1:
        return torch.where(known, fires, before[:, None])
    steps = torch.arange(1, fires.shape[1] + 1, device=fires.device)
    last = torch.where(known, steps, 0).cummax(1).values
    return torch.cat([before[:, None], fires], 1).gather(1, last)
