"""REMEDI's loss on one batch of rows (Hernandez, Li, Andreas 2023, equations 5 to 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.pushed_rows import Place, PushedBatch
from guardedit.models.handle import ModelHandle


@dataclass(frozen=True)
class LossWeights:
    """How the three terms are weighed."""

    new: float = 1.0
    """−log p(new target), mean over its tokens."""
    old: float = 1.0
    """−log(1 − p(old target's first token))."""
    kept: float = 10.0
    """KL(before ‖ after) in nats a kept token."""


@dataclass(frozen=True, eq=False)
class Terms:
    """Sums over a batch's rows or tokens, with how many there are: batches are added up before they are divided."""

    new: Float[Tensor, ""]
    old: Float[Tensor, ""]
    kept: Float[Tensor, ""]
    n_new: int
    n_old: int
    n_kept: int

    @classmethod
    def added(cls, terms: Sequence[Terms]) -> Terms:
        """All batches as one."""
        new, old, kept = (
            torch.stack([getattr(term, name) for term in terms]).sum() for name in ("new", "old", "kept")
        )
        return cls(
            new=new,
            old=old,
            kept=kept,
            n_new=sum(term.n_new for term in terms),
            n_old=sum(term.n_old for term in terms),
            n_kept=sum(term.n_kept for term in terms),
        )

    def total(self, weights: LossWeights) -> Float[Tensor, ""]:
        """The weighed sum of the means; a term without a row or token counts nothing."""
        return (
            weights.new * self.new / max(self.n_new, 1)
            + weights.old * self.old / max(self.n_old, 1)
            + weights.kept * self.kept / max(self.n_kept, 1)
        )


def batch_terms(handle: ModelHandle, batch: PushedBatch, directions: Float[Tensor, "rows d_model"]) -> Terms:
    """The three terms of a batch in which each row has its fact's direction added; gradients reach `directions`."""
    hidden = batch.hidden(directions)
    new = -(target_logprobs(handle, batch, hidden) * batch.target_weights)
    at_old = _logprobs(handle, hidden, batch.olds)
    # log(1 − p) from the other tokens: 1 − p itself rounds to 0 where the old target is certain.
    others = at_old.scatter(1, batch.old_ids[:, None], -torch.inf).logsumexp(1)
    return Terms(
        new=new.sum(),
        old=-others.sum(),
        kept=kept_kl(handle, batch, hidden).sum(),
        n_new=int(batch.target_weights.sum().round()),
        n_old=len(batch.old_ids),
        n_kept=len(batch.states),
    )


def target_logprobs(
    handle: ModelHandle, batch: PushedBatch, hidden: Float[Tensor, "rows seq d_model"]
) -> Float[Tensor, " targets"]:
    """Of every target token of every row, in nats."""
    return _logprobs(handle, hidden, batch.targets).gather(1, batch.target_ids[:, None])[:, 0]


def kept_kl(
    handle: ModelHandle, batch: PushedBatch, hidden: Float[Tensor, "rows seq d_model"]
) -> Float[Tensor, " kept"]:
    """KL(before ‖ after) in nats at every kept position of every row: the published code keeps the last row's alone."""
    if not len(batch.states):
        return hidden.new_zeros(0)
    after = _logprobs(handle, hidden, batch.kept)
    with torch.no_grad():
        before = _of_states(handle, batch.states)
    return (before.exp() * (before - after)).sum(1)


def _logprobs(handle: ModelHandle, hidden: Tensor, place: Place) -> Float[Tensor, "n vocab"]:
    return _of_states(handle, hidden[place])


def _of_states(handle: ModelHandle, states: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    everywhere = torch.ones(1, len(states), dtype=torch.bool, device=states.device)
    return handle.logits_at(states[None], everywhere).float().log_softmax(-1)
