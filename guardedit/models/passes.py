"""What one forward pass is given: its tokens, what is padding, and which positions decide for which.

A row's *segment* begins at position 0 and behind each turn marker. Positions that *decide* are those of the prompt;
an answer's positions keep the decision of what stands before them. A pass of one token on a filled cache, or of answer
tokens alone, decides nothing: it holds what the cache remembers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from guardedit.errors import BadRequestError
from guardedit.models.turns import Ids, ends_of

_REMEMBERED = "_activation_edits"
"""Attribute of a key-value cache. On the cache itself, a copy of the cache takes its decisions along."""


@dataclass(frozen=True, eq=False)
class Held:
    """A decision of each row, kept beside a key-value cache."""

    fires: Bool[Tensor, " rows"]
    any: bool
    """Whether any row fires: known without looking at the tensor again."""

    @classmethod
    def of(cls, fires: Bool[Tensor, " rows"]) -> Held:
        """The decision with its summary."""
        return cls(fires, bool(fires.any()))

    def for_rows(self, n_rows: int) -> Bool[Tensor, " n_rows"]:
        """The decision for a cache whose rows were repeated, each in its place (several answers to one prompt).

        Raises BadRequestError where the rows no longer tell which decision is whose.
        """
        known = len(self.fires)
        if n_rows == known:
            return self.fires
        if n_rows % known == 0:
            return self.fires.repeat_interleave(n_rows // known)
        if bool(self.fires.all()) or not self.any:
            return self.fires[:1].expand(n_rows)
        raise BadRequestError(
            f"a key-value cache of {known} rows was cut to {n_rows}, and an activation edit fires in some of them "
            "only; run the prompts again"
        )


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass, as activation edits look at it."""

    ids: Int[Tensor, "rows seq"]
    """Token ids, −1 where padded."""
    decides: Bool[Tensor, "rows seq"] | None
    """Positions that decide; None where the whole pass holds what was decided before."""
    segments: Int[Tensor, "rows seq"] | None
    """Each position's segment, counted in its row from 0; None where every row is one segment."""
    held: Mapping[str, Held]
    """Edit -> what the cache remembers of it."""
    cache: Any = None
    """The key-value cache that the pass is given."""
    cached: bool = False
    """Whether tokens stand before the pass, in that cache."""

    @property
    def real(self) -> Bool[Tensor, "rows seq"]:
        """Positions that are no padding."""
        return self.ids >= 0

    def held_for(self, name: str) -> Bool[Tensor, " rows"] | None:
        """Each row's decision before this pass; None where none fires, or none is known."""
        held = self.held.get(name)
        if held is None or not held.any:
            return None
        return held.for_rows(len(self.ids))


def read_pass(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    marker: Ids,
    *,
    deciding: Tensor | None = None,
    prompt_width: int | None = None,
) -> Pass:
    """The pass that a base model is called for.

    deciding: (rows, seq), positions that decide in passes of that shape. prompt_width: columns of the prompt in a
    generation; later ones are answers. Raises BadRequestError for a call without token ids, or with a mask that does
    not tell which tokens are padding.
    """
    given = {**named_arguments(module, args), **kwargs}
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise BadRequestError(
            "an activation edit reads tokens, and this forward pass was given no input_ids (rows, seq); call the model "
            "with token ids instead of embeddings"
        )
    past = cached_length(cache)
    real = _real(given.get("attention_mask"), ids)
    ids = torch.where(real, ids, -1) if real is not None else ids
    held = getattr(cache, _REMEMBERED, {}) if past else {}
    if past and (ids.shape[1] == 1 or (prompt_width is not None and past >= prompt_width)):
        return Pass(ids, None, None, held, cache, cached=True)
    decides = ids >= 0
    if deciding is not None and deciding.shape == ids.shape:
        decides = decides & deciding.to(ids.device, torch.bool)
    if prompt_width is not None and past + ids.shape[1] > prompt_width:
        decides = decides.clone()
        decides[:, prompt_width - past :] = False
    segments, decides = _split(ids, decides, marker, cached=bool(past))
    return Pass(ids, decides, segments, held, cache, bool(past))


def _split(ids: Tensor, decides: Tensor, marker: Ids, *, cached: bool) -> tuple[Tensor | None, Tensor]:
    """Segments, and positions that decide: behind a cache, what stands before a row's first marker holds."""
    ends = ends_of(ids, (marker,)) if marker else None
    if ends is None or not bool(ends.any()):
        return None, decides
    segments = ends.long().cumsum(1) - ends.long()
    return segments, decides & ((segments > 0) | ~ends.any(1, keepdim=True)) if cached else decides


def named_arguments(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by name; the first is always the token ids."""
    if len(args) < 2:
        return {"input_ids": args[0]} if args else {}
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments)


def _real(mask: Any, ids: Tensor) -> Bool[Tensor, "rows seq"] | None:
    """Positions of the pass that are no padding; None where there is no mask. A cached pass has the longer mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
        raise BadRequestError(
            "an activation edit has to know what is padding: give the model an attention_mask (rows, seq), not "
            f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    return mask[:, -ids.shape[1] :].to(ids.device) != 0


def cached_length(cache: Any) -> int:
    """Tokens that a key-value cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def remember(cache: Any, decisions: Mapping[str, Held]) -> None:
    """Keep the rows' decisions beside the cache that the pass filled, over those of earlier passes."""
    if cache is not None:
        setattr(cache, _REMEMBERED, {**getattr(cache, _REMEMBERED, {}), **decisions})
