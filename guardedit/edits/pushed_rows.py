"""Rows of tokens in which a direction is added at the subject's last token, run again and again from there on.

What stands before the subject's last token, and all blocks up to the one that is pushed, do not feel the push: they
are computed once (`Suffix`). Rows of similar length share a batch, whatever facts they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import HookPoint
from guardedit.models.suffix import Suffix, split_rows


@dataclass(frozen=True)
class PushedRow:
    """One prompt, perhaps with a target behind it, about one fact."""

    fact: int
    """Which direction is added."""
    ids: tuple[int, ...]
    at: int
    """Index of the subject's last token."""
    targets: tuple[tuple[int, int], ...] = ()
    """(position, next token) of each target token."""
    old: tuple[int, int] | None = None
    """(position, first token of the old target), where it is not the new one's first token too."""
    kept: tuple[int, ...] = ()
    """Positions whose next-token distribution shall stay."""


Place = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
"""Rows of a batch, and positions counted from their subjects' last tokens."""


@dataclass(frozen=True, eq=False)
class PushedBatch:
    """Rows that run together."""

    suffix: Suffix
    fact_of: Int[Tensor, " rows"]
    targets: Place
    target_ids: Int[Tensor, " targets"]
    target_weights: Float[Tensor, " targets"]
    """Each row's add up to 1."""
    olds: Place
    old_ids: Int[Tensor, " olds"]
    kept: Place
    states: Float[Tensor, "kept d_model"]
    """Final hidden states of the unedited model at `kept`: its next-token distributions follow from them."""

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return len(self.fact_of)

    def hidden(self, added: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows seq d_model"]:
        """Final hidden states from the subject's last token on, with `added` put to the residual stream there."""
        before = self.suffix.again.shape[1]
        pre = self.suffix.resid_pre
        moved = pre[:, before : before + 1] + added[:, None].to(pre)
        resid = torch.cat([pre[:, :before], moved, pre[:, before + 1 :]], 1)
        return replace(self.suffix, resid_pre=resid).hidden()


def push_layer(handle: ModelHandle, hook_name: str) -> int:
    """The layer of a `blocks.{L}.hook_resid_post` that has a block above it.

    Raises BadRequestError for another hook, or the last block's: no later token would see a push there.
    """
    point = HookPoint.parse(hook_name, handle.n_layers)
    if point.point != "hook_resid_post" or point.layer + 1 >= handle.n_layers:
        raise BadRequestError(
            f"a direction cannot be trained at {hook_name}; use blocks.L.hook_resid_post with L from 0 to "
            f"{handle.n_layers - 2}, so that later tokens see it"
        )
    return point.layer


def make_batches(
    handle: ModelHandle, rows: Sequence[PushedRow], hook_name: str, batch_size: int
) -> tuple[PushedBatch, ...]:
    """Batches of rows of similar length, with everything that a push cannot change computed."""
    layer = push_layer(handle, hook_name) + 1
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids) - rows[i].at, rows[i].at, i))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return tuple(_batch(handle, [rows[i] for i in chunk], layer) for chunk in chunks)


def _batch(handle: ModelHandle, rows: Sequence[PushedRow], layer: int) -> PushedBatch:
    suffix = split_rows(handle, [row.ids for row in rows], [row.at for row in rows], layer)
    device = suffix.input_ids.device
    targets = [(i, at - row.at) for i, row in enumerate(rows) for at, _ in row.targets]
    olds = [(i, row.old[0] - row.at) for i, row in enumerate(rows) if row.old is not None]
    kept = _place([(i, at - row.at) for i, row in enumerate(rows) for at in row.kept], device)
    weights = [1 / len(row.targets) for row in rows for _ in row.targets]
    with torch.no_grad():
        states = suffix.hidden()[kept] if len(kept[0]) else torch.empty(0, handle.d_model, device=device)
    return PushedBatch(
        suffix=suffix,
        fact_of=torch.tensor([row.fact for row in rows], device=device),
        targets=_place(targets, device),
        target_ids=torch.tensor([token for row in rows for _, token in row.targets], device=device),
        target_weights=torch.tensor(weights, device=device),
        olds=_place(olds, device),
        old_ids=torch.tensor([row.old[1] for row in rows if row.old is not None], device=device),
        kept=kept,
        states=states,
    )


def _place(pairs: Sequence[tuple[int, int]], device: torch.device) -> Place:
    both = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
    return both[:, 0], both[:, 1]
