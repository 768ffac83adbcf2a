"""Run only the end of each row: what stands before a split point is fixed and remembered as keys and values.

A change made at one token cannot reach earlier tokens (attention is causal), so an optimisation over that change
needs the tokens before it once, and the layers below it once. Where a family's keys and values do not say all about
the tokens before (`prefix_cache` in its row), those tokens run again each time, with the same results. So they do with
an activation edit installed: its gate may be decided by what stands behind the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record, resume
from guardedit.models.installed import edits_of, whole_from
from guardedit.models.partial import only_from
from guardedit.models.tokens import pad_id, position_ids


@dataclass(frozen=True, eq=False)
class Suffix:
    """Rows from their split token on, with the keys and values of everything before."""

    handle: ModelHandle
    layer: int
    input_ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    """True for real tokens."""
    full_mask: Int[Tensor, "batch past_and_seq"]
    position_ids: Int[Tensor, "batch seq"]
    past: tuple[tuple[Tensor, Tensor], ...]
    """Per layer, keys and values (batch, heads, past, d_head); empty where no row has a token before its split."""
    again: Int[Tensor, "batch again"]
    """Tokens before the split that are run again each time: none where keys and values are remembered."""
    resid_pre: Float[Tensor, "batch again_and_seq d_model"]
    """Input of block `layer`."""

    def hidden(self) -> Float[Tensor, "batch seq d_model"]:
        """Hidden states after the final norm, recomputed from block `layer` on.

        Hooks that were entered before see the positions from the split on, and only those.
        """
        with (
            only_from(self.handle, self.again.shape[1], self.layer),
            resume(self.handle, self.layer, self.resid_pre),
        ):
            return self._run()

    def _run(self) -> Float[Tensor, "batch seq d_model"]:
        n_again = self.again.shape[1]
        output = self.handle.model.base_model(
            input_ids=torch.cat([self.again, self.input_ids], 1),
            attention_mask=self.full_mask,
            position_ids=torch.cat([position_ids(self.full_mask[:, :n_again]), self.position_ids], 1),
            past_key_values=_cache(self.past) if self.past else None,
            use_cache=bool(self.past),
        )
        states: Tensor = output.last_hidden_state
        return states[:, n_again:].to(self.input_ids.device)

    def select(self, rows: Int[Tensor, " n"]) -> Suffix:
        """The same for some of the rows, without columns that only padding is left in."""
        width = int(self.mask[rows].sum(1).max())
        past = self.full_mask.shape[1] - self.input_ids.shape[1]
        return replace(
            self,
            input_ids=self.input_ids[rows][:, :width],
            mask=self.mask[rows][:, :width],
            full_mask=self.full_mask[rows][:, : past + width],
            position_ids=self.position_ids[rows][:, :width],
            past=tuple((keys[rows], values[rows]) for keys, values in self.past),
            again=self.again[rows],
            resid_pre=self.resid_pre[rows][:, : self.again.shape[1] + width],
        )


def split_rows(
    handle: ModelHandle, rows: Sequence[Sequence[int]], splits: Sequence[int], layer: int
) -> Suffix:
    """Prepare token rows, each split before index `splits[i]`, for repeated runs from block `layer` on.

    A split of 0 leaves the row whole. Position 0 of each row of the result is its token `splits[i]`. With activation
    edits installed, runs start lower where one of them would else miss what it reads.
    """
    layer = whole_from(handle, layer)
    prefix, prefix_mask = _pad(
        handle, [list(row[:at]) for row, at in zip(rows, splits, strict=True)], left=True
    )
    ids, mask = _pad(handle, [list(row[at:]) for row, at in zip(rows, splits, strict=True)], left=False)
    starts = torch.tensor(list(splits), device=handle.device)
    positions = starts[:, None] + torch.arange(ids.shape[1], device=handle.device)
    # Padding behind a late split would else stand beyond a learned position embedding.
    positions = positions.clamp(max=handle.context_length - 1)
    full_mask = torch.cat([prefix_mask, mask], 1)
    remembers = handle.architecture.prefix_cache and not edits_of(handle)
    again = prefix[:, :0] if remembers else prefix
    name = f"blocks.{layer}.hook_resid_pre"
    with torch.no_grad():
        past = past_of(handle, prefix, prefix_mask) if prefix.shape[1] > again.shape[1] else ()
        rest = Suffix(handle, layer, ids, mask.bool(), full_mask, positions, past, again, torch.empty(0))
        with record(handle, [name], stop=True) as seen:
            rest._run()
    return replace(rest, resid_pre=seen[name])


def _pad(handle: ModelHandle, rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id(handle), dtype=torch.long, device=handle.device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, where] = torch.tensor(row, dtype=torch.long, device=handle.device)
        mask[index, where] = 1
    return ids, mask


def past_of(handle: ModelHandle, ids: Tensor, mask: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values (batch, heads, seq, d_head) of every layer, from one forward pass over `ids` (batch, seq).

    Raises BadRequestError where the family's do not say all about those tokens.
    """
    if not handle.architecture.prefix_cache:
        raise BadRequestError(
            f"the keys and values of {handle.name} ({handle.architecture.name}) do not say all about the tokens "
            "before: nothing can be computed from them"
        )
    cache = _cache(())
    handle.model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def _cache(past: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A fresh cache for each run: a forward pass appends to the one it is given.

    Made without the model's configuration, it keeps every token in every layer. Transformers' own would drop what is
    out of a sliding window, counted from the end of the padded prefix; the mask hides those tokens either way.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    return cache
