"""Rows of tokens that are run again and again from one token on, with a residual added there.

A change at a row's first position cannot reach earlier tokens, nor layers below, so both are computed once (`Suffix`).
Rows of similar length run together, and logits are computed only where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, rewrite_hook
from guardedit.models.suffix import Suffix, split_rows

_OVERHEAD = 24
"""What a pass over the weights costs beside its tokens, in tokens: it reads them all, however few rows there are."""


@dataclass(frozen=True)
class Row:
    """Token ids, the index of the subject's last token, and the positions from there on whose logits are needed."""

    ids: list[int]
    split: int
    reads: list[int]

    @property
    def length(self) -> int:
        """Tokens that are run again."""
        return len(self.ids) - self.split


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows in the order of their lengths."""

    layer: int
    suffix: Suffix
    row_of: Int[Tensor, " reads"]
    at_of: Int[Tensor, " reads"]
    """Row and position of each read, in row order."""

    @cached_property
    def _parts(self) -> tuple[tuple[slice, Suffix], ...]:
        """Rows that run together: padding is work for nothing, but so is a pass over the weights for a few rows."""
        lengths = self.suffix.mask.sum(1).tolist()
        numbers = torch.arange(len(lengths), device=self.row_of.device)
        return tuple((cut, self.suffix.select(numbers[cut])) for cut in bucketed(lengths))

    def logprobs(self, added: Float[Tensor, "rows d_model"] | None = None) -> Float[Tensor, "reads vocab"]:
        """At every read, with `added` put to the rewrite module's output at the rows' first positions."""
        found = []
        for rows, suffix in self._parts:
            inside = (self.row_of >= rows.start) & (self.row_of < rows.stop)
            hidden = _moved_hidden(suffix, self.layer, None if added is None else added[rows])
            found.append(hidden[self.row_of[inside] - rows.start, self.at_of[inside]])
        states = torch.cat(found)[None]
        everywhere = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return self.suffix.handle.logits_at(states, everywhere).float().log_softmax(-1)

    def select(self, kept: Bool[Tensor, " rows"]) -> RowSet:
        """The rows that are kept, renumbered."""
        reads, number = kept[self.row_of], kept.cumsum(0) - 1
        return replace(
            self,
            suffix=self.suffix.select(kept.nonzero()[:, 0]),
            row_of=number[self.row_of[reads]],
            at_of=self.at_of[reads],
        )


def make_rowset(handle: ModelHandle, rows: Sequence[Row], layer: int) -> RowSet:
    """Split and remember the rows, which must stand in the order of their lengths."""
    suffix = split_rows(handle, [row.ids for row in rows], [row.split for row in rows], layer)
    reads = [(index, at) for index, row in enumerate(rows) for at in row.reads]
    device = suffix.input_ids.device
    row_of, at_of = (torch.tensor([read[side] for read in reads], device=device) for side in (0, 1))
    return RowSet(layer, suffix, row_of, at_of)


def _moved_hidden(suffix: Suffix, layer: int, added: Tensor | None) -> Float[Tensor, "rows seq d_model"]:
    if added is None:
        return suffix.hidden()

    def add(output: Tensor) -> Tensor:
        moved = output[:, :1] + added[:, None].to(output)
        return torch.cat([moved, output[:, 1:]], 1)

    with patch(suffix.handle, rewrite_hook(layer), add):
        return suffix.hidden()


def bucketed(lengths: Sequence[int], overhead: int = _OVERHEAD) -> list[slice]:
    """Cut rows of ascending lengths into runs that are padded to their longest, at the least cost.

    The cost of a run is its rows times its longest length, and `overhead` for the run itself.
    """
    edges = [0, *(i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]), len(lengths)]
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(edges)):
        costs = [
            (best[start][0] + (edges[end] - edges[start]) * lengths[edges[end] - 1] + overhead, start)
            for start in range(end)
        ]
        best.append(min(costs))
    cuts, end = [], len(edges) - 1
    while end:
        start = best[end][1]
        cuts.append(slice(edges[start], edges[end]))
        end = start
    return cuts[::-1]
