"""Text that no edit is about: how far the edited model's predictions are from the unedited one's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guardedit.drift.behaviour import Positions, compare
from guardedit.drift.probes import Rows, far_rows
from guardedit.evaluation.methods import Session
from guardedit.models.handle import ModelHandle, preserved

FAR_TOKENS = 1_024
"""Tokens of control text, all domains together: rows of up to 128."""


@dataclass(frozen=True, eq=False)
class FarText:
    """Control text with the unedited model's final hidden states, which are computed once."""

    rows: Rows
    before: tuple[Tensor, ...]
    """A batch each: (real tokens, d_model)."""

    @classmethod
    def of(
        cls,
        handle: ModelHandle,
        n_tokens: int = FAR_TOKENS,
        seed: int = 0,
        texts: Mapping[str, Sequence[str]] | None = None,
    ) -> FarText:
        """The shipped control text's test half, or `texts` by domain, read by the model as it is."""
        rows, _ = far_rows(handle, n_tokens, seed, texts)
        return cls(rows, tuple(_states(handle, rows)))

    def moves(self, session: Session) -> dict[str, tuple[float, ...]]:
        """A value a row, by domain and for all: `far_kl_nats`, `far_lost_top1` and, as logarithms, `perplexity_ratio`.

        Nothing where a prediction is not finite: a broken model has no distance, and no other figure of it is good.
        """
        found: dict[str, list[float]] = {}
        for domain, positions in zip(self.rows.domains, self._compared(session), strict=True):
            gain = positions.nll_after - positions.nll_before
            values = {
                "far_kl_nats": float(positions.kl_nats.mean()),
                "far_lost_top1": float(positions.lost.double().mean()),
                "perplexity_ratio": float(gain[~positions.nll_before.isnan()].double().mean()),
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
                found.setdefault(f"{name}_{domain}", []).append(value)
        return {n: tuple(values) for n, values in found.items() if all(map(math.isfinite, values))}

    @torch.no_grad()
    def _compared(self, session: Session) -> Iterator[Positions]:
        """Every row, in order."""
        handle = session.handle
        head = handle.model.get_submodule(handle.architecture.unembedding)
        heads, after = (session.reference_head, head), _states(handle, self.rows)
        for (ids, mask), old, new in zip(self.rows.batches, self.before, after, strict=True):
            lengths = mask.sum(1).tolist()
            rows = zip(old.split(lengths), new.split(lengths), ids, lengths, strict=True)
            for before, edited, row, length in rows:
                following = torch.cat([row[1:length], row.new_full((1,), -1)])
                one = torch.zeros(length, dtype=torch.long)
                yield compare(before, edited, heads, following, one, handle.capped)


@torch.no_grad()
def _states(handle: ModelHandle, rows: Rows) -> Iterator[Tensor]:
    """Final hidden states of the real tokens, batch by batch."""
    for ids, mask in rows.batches:
        with preserved(handle):
            hidden = handle.hidden(ids, mask)
        yield hidden[mask.bool()]
