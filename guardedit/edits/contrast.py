"""Guarded values: the edit holds by a margin, and what the model says about the rest of the subject stays.

Per fact, in nats: mean over contexts of (NLL of the target − `hold_loss`)₊ + mean over contexts and rewordings of
(`margin` − gap)₊ + `keep_weight` · mean KL(unedited ‖ edited) of the next token after openings about the subject +
`keep_contrast` · mean (1 − gap)₊ there, where gap = log P(new) − log P(old) at the first token at which the two targets
part. A likelihood would have to make the target an answer wherever it is asked for, also in wordings that hardly ask;
a margin only has to make it likelier than the old answer, which moves next to nothing where neither is likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardedit.edits.objective import Fact, all_target_rows, text_row
from guardedit.edits.openings import OPENINGS, about
from guardedit.edits.rowset import RowSet, make_rowset
from guardedit.edits.value_types import Told, Value, ValueHparams
from guardedit.errors import SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import encode_pairs

LAST_RATE = 0.2
"""The learning rate falls to this share of itself: steps are few, and none is picked out afterwards."""
KEPT_MARGIN = 1.0
"""The margin that is asked for at the openings, in nats."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Rows with the target behind them, of all facts."""

    rows: RowSet
    fact_of: Int[Tensor, " rows"]
    in_context: Bool[Tensor, " rows"]
    target_ids: Int[Tensor, " reads"]
    rivals: Int[Tensor, " reads"]
    """The old target's token where the two part; −1 elsewhere."""

    def terms(self, residuals: Tensor) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Of each row: the target's mean NLL a token, and the gap (infinite where there is none)."""
        logprobs, row_of = self.rows.logprobs(residuals[self.fact_of]), self.rows.row_of
        count = torch.bincount(row_of, minlength=len(self.fact_of)).to(logprobs)
        new = logprobs.gather(-1, self.target_ids[:, None])[:, 0]
        nll = -torch.zeros_like(count).index_add(0, row_of, new) / count
        parts = self.rivals >= 0
        gaps = new[parts] - logprobs[parts].gather(-1, self.rivals[parts][:, None])[:, 0]
        return nll, torch.full_like(count, torch.inf).index_put((row_of[parts],), gaps)


@dataclass(frozen=True, eq=False)
class Kept:
    """Openings about the subjects, read at their last token."""

    rows: RowSet
    fact_of: Int[Tensor, " rows"]
    base: Float[Tensor, "rows vocab"]
    """Log-probabilities of the unedited model."""
    counts: Float[Tensor, " rows"]
    """1; 0 where the unedited model's answer begins a target: that opening asks for the edited relation itself."""
    new: Int[Tensor, " rows"]
    old: Int[Tensor, " rows"]
    """Tokens at which the targets part; both −1 where the fact has no old one."""

    def terms(self, residuals: Tensor) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Of each row: KL(unedited ‖ edited) of the next token, and the gap (infinite where there is none)."""
        logprobs = self.rows.logprobs(residuals[self.fact_of])
        kl = (self.base.exp() * (self.base - logprobs)).sum(-1)
        known = self.old >= 0
        gap = torch.full_like(kl, torch.inf)
        pair = [logprobs.gather(-1, ids.clamp(min=0)[:, None])[:, 0] for ids in (self.new, self.old)]
        return kl, torch.where(known, pair[0] - pair[1], gap)


def make_asked(handle: ModelHandle, facts: Sequence[Fact], layer: int) -> Asked:
    """Rows of contexts and rewordings; errors as `make_objective`."""
    rows = sorted(all_target_rows(handle, facts, layer), key=lambda pair: pair[1].row.length)
    found = make_rowset(handle, [row.row for _, row in rows], layer)
    device = found.row_of.device
    return Asked(
        rows=found,
        fact_of=torch.tensor([number for number, _ in rows], device=device),
        in_context=torch.tensor([row.in_context for _, row in rows], device=device),
        target_ids=torch.tensor([token for _, row in rows for token in row.targets], device=device),
        rivals=torch.tensor([token for _, row in rows for token in row.rivals], device=device),
    )


def make_kept(handle: ModelHandle, facts: Sequence[Fact], openings: Sequence[str], layer: int) -> Kept:
    """The openings about every fact's subject, with what the unedited model says behind them."""
    rows = []
    for number, fact in enumerate(facts):
        for opening in openings:
            text, at = about(opening, fact.request)
            rows.append((number, text_row(handle, text, at, fact.request.subject)))
    rows.sort(key=lambda pair: pair[1].length)
    found = make_rowset(handle, [row for _, row in rows], layer)
    device, parting = found.row_of.device, [_parting(handle, fact) for fact in facts]
    with torch.no_grad():
        base = found.logprobs()
    says = base.argmax(-1).tolist()
    counts = [float(token not in parting[number]) for token, (number, _) in zip(says, rows, strict=True)]
    new, old = (torch.tensor([parting[number][side] for number, _ in rows], device=device) for side in (0, 1))
    fact_of = torch.tensor([number for number, _ in rows], device=device)
    return Kept(found, fact_of, base, torch.tensor(counts, device=device), new, old)


def _parting(handle: ModelHandle, fact: Fact) -> tuple[int, int]:
    """First tokens of the new and the old target behind the request's prompt; −1 for an old one that is not there."""
    targets = [fact.request.target_new, *([fact.request.target_true] if fact.request.target_true else [])]
    pairs = encode_pairs(handle, [fact.request.filled] * len(targets), targets)
    first = [int(ids[mask][0]) for ids, mask in zip(pairs["input_ids"], pairs["target_mask"], strict=True)]
    return first[0], first[1] if len(first) > 1 and first[1] != first[0] else -1


def guarded_values(
    handle: ModelHandle,
    facts: Sequence[Fact],
    layer: int,
    bounds: Sequence[float],
    hparams: ValueHparams,
    starts: Sequence[Tensor | None],
    progress: Told | None,
) -> list[Value]:
    """The values of one batch after `steps` steps of Adam; each fact's loss is its own.

    The openings take turns: each step keeps every `keep_turns`-th of them. Errors as `optimise_value`.
    """
    asked, turns = make_asked(handle, facts, layer), max(1, min(hparams.keep_turns, hparams.keep_openings))
    openings = OPENINGS[: hparams.keep_openings]
    kept = [make_kept(handle, facts, openings[turn::turns], layer) for turn in range(turns)]
    residuals = torch.zeros(len(facts), handle.d_model, device=handle.device)
    for row, start in zip(residuals, starts, strict=True):
        if start is not None:
            row.copy_(start)
    residuals.requires_grad_(True)
    adam = torch.optim.Adam([residuals], lr=hparams.learning_rate)
    sizes = torch.tensor(list(bounds), device=handle.device)
    losses: list[list[float]] = []
    clamped = torch.zeros(len(facts), dtype=torch.bool, device=handle.device)
    for step in range(hparams.steps + 1):
        total, nll = _total(asked, kept[step % turns], residuals, hparams, len(facts))
        losses.append(_checked(nll, step))
        if progress is not None:
            progress(step, sum(losses[-1]) / len(facts))
        if step == hparams.steps:
            break
        adam.param_groups[0]["lr"] = hparams.learning_rate * (1 - (1 - LAST_RATE) * step / hparams.steps)
        decay = hparams.weight_decay * residuals.norm(dim=1) / (sizes / hparams.clamp_norm_factor).square()
        adam.zero_grad()
        (total + decay).sum().backward()
        adam.step()
        clamped |= _project(residuals, sizes)
    return _outcome(kept, residuals.detach(), losses, clamped, hparams)


def _total(
    asked: Asked, kept: Kept, residuals: Tensor, hparams: ValueHparams, n_facts: int
) -> tuple[Tensor, Tensor]:
    """(loss, NLL over contexts) of each fact; see the module's head."""
    nll, gap = asked.terms(residuals)
    ctx, ones = asked.in_context.to(nll), torch.ones_like(nll)
    kl, kept_gap = kept.terms(residuals)
    hold = _mean((nll - hparams.hold_loss).relu(), ctx, asked.fact_of, n_facts)
    contrast = _mean((hparams.margin - gap).relu(), ones, asked.fact_of, n_facts)
    moved = _mean(kl, kept.counts, kept.fact_of, n_facts)
    beaten = _mean((KEPT_MARGIN - kept_gap).relu(), torch.ones_like(kl), kept.fact_of, n_facts)
    total = hold + contrast + hparams.keep_weight * moved + hparams.keep_contrast * beaten
    return total, _mean(nll.detach(), ctx, asked.fact_of, n_facts)


def _mean(values: Tensor, counts: Tensor, fact_of: Tensor, n_facts: int) -> Float[Tensor, " facts"]:
    """Each fact's mean over the rows that count; 0 where none does."""
    zeros = torch.zeros(n_facts, device=values.device)
    found: Tensor = zeros.index_add(0, fact_of, values * counts)
    return torch.div(found, zeros.index_add(0, fact_of, counts).clamp(min=1))


def _checked(nll: Tensor, step: int) -> list[float]:
    if not bool(nll.isfinite().all()):
        raise SolveError(
            f"a loss at step {step} is not a number; lower the learning rate or check the weights"
        )
    return [float(value) for value in nll]


@torch.no_grad()
def _project(residuals: Tensor, bounds: Tensor) -> Bool[Tensor, " facts"]:
    """Bring every residual back inside its bound, in place; which of them were outside."""
    norms: Tensor = residuals.norm(dim=1)
    residuals.mul_((bounds / norms.clamp(min=1e-12)).clamp(max=1)[:, None])
    return norms > bounds


@torch.no_grad()
def _outcome(
    kept: Sequence[Kept],
    residuals: Tensor,
    losses: Sequence[Sequence[float]],
    clamped: Tensor,
    hparams: ValueHparams,
) -> list[Value]:
    count = len(residuals)
    turns = [_mean(one.terms(residuals)[0], one.counts, one.fact_of, count) for one in kept]
    moved = torch.stack(turns).mean(0)
    last = torch.tensor(losses[-1])
    plain = Value(residuals[0].double(), (), 0.0, 0.0, False, keep_weight=hparams.keep_weight)
    return [
        replace(
            plain,
            residual=residuals[index].double().clone(),
            losses=tuple(step[index] for step in losses),
            p_new=float((-last[index]).exp()),
            clamped=bool(clamped[index]),
            kept_nats=float(moved[index]),
        )
        for index in range(count)
    ]
