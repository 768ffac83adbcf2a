"""What the model says: KL in nats, perplexity, answers that are no longer the most likely ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from guardedit.drift.probes import Rows, Target
from guardedit.models.handle import ModelHandle
from guardedit.records import DomainDrift, ProbeChange, Scope

Floats = NDArray[np.float64]
RESAMPLES = 2_000
_CHUNK = 128
_LARGE = 40.0


@dataclass(frozen=True)
class Positions:
    """Next-token predictions of both models at the same positions, all (n,)."""

    kl_nats: Float[Tensor, " n"]
    """KL(before ‖ after)."""
    top_before: Int[Tensor, " n"]
    top_after: Int[Tensor, " n"]
    p_before: Float[Tensor, " n"]
    """Probability of the reference's top token, in the reference."""
    p_after: Float[Tensor, " n"]
    """Probability of the same token in the edited model."""
    nll_before: Float[Tensor, " n"]
    """−log P of the token that follows, NaN where none does."""
    nll_after: Float[Tensor, " n"]
    sequence: Int[Tensor, " n"]
    """Row index within the rows."""

    @property
    def lost(self) -> Bool[Tensor, " n"]:
        """The most likely token changed."""
        return self.top_before != self.top_after


@torch.no_grad()
def compare(
    final_before: Float[Tensor, "n d_model"],
    final_after: Float[Tensor, "n d_model"],
    heads: tuple[nn.Module, nn.Module],
    following: Int[Tensor, " n"],
    sequence: Int[Tensor, " n"],
    finish: Callable[[Tensor], Tensor],
) -> Positions:
    """Logits of both sides in chunks, compared over the whole vocabulary; `following` is −1 where no token follows.

    `finish` is what the model makes of a head's output: `ModelHandle.capped`.

    KL(p ‖ q) = Σ p·(e^d − 1 − d), d = log q − log p: every term is ≥ 0 and exactly 0 where the logits agree, so
    that rounding in the normalisation enters squared only.
    """
    dtype = next(heads[0].parameters()).dtype
    chunks = (slice(start, start + _CHUNK) for start in range(0, len(following), _CHUNK))
    parts = [
        _compare_chunk(
            finish(heads[0](final_before[c].to(dtype))),
            finish(heads[1](final_after[c].to(dtype))),
            following[c],
        )
        for c in chunks
    ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Positions(*columns, sequence)  # type: ignore[call-arg]


def _compare_chunk(before: Tensor, after: Tensor, following: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    top_before, top_after = log_p.argmax(-1), log_q.argmax(-1)
    index = following.clamp(min=0)[:, None]
    blank = torch.where(following < 0, math.nan, 0.0)
    nll_before, nll_after = (blank - table.gather(-1, index)[:, 0] for table in (log_p, log_q))
    p_before, p_after = (table.gather(-1, top_before[:, None])[:, 0].exp() for table in (log_p, log_q))
    return _kl(log_p, log_q), top_before, top_after, p_before, p_after, nll_before, nll_after


def _kl(log_p: Float[Tensor, "n vocab"], log_q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Overwrites both arguments: at this size every fresh table is time spent on memory."""
    if float((log_q - log_p).max()) > _LARGE:  # e^d would overflow where p underflows; q itself does not
        q = log_q.exp()
        return (q - log_p.exp() * (1 + log_q - log_p)).clamp(min=0).sum(-1).double()
    difference = log_q.sub_(log_p)
    return torch.expm1(difference).sub_(difference).mul_(log_p.exp_()).sum(-1).double()


def joined(parts: Sequence[Positions]) -> Positions:
    """Positions of several batches, one after the other."""
    return Positions(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in Positions.__dataclass_fields__
        }
    )


def interval(sums: Floats, counts: Floats, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of Σ sums / Σ counts over sequences; the point itself for fewer than two."""
    n = len(sums)
    if n < 2:
        point = float(sums.sum() / max(counts.sum(), 1))
        return point, point
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    means = (drawn @ sums) / np.maximum(drawn @ counts, 1e-300)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share of n."""
    z, spread = 1.959964, 1.959964**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Summary:
    """One domain's behaviour; every field may be NaN where the models give NaN."""

    domain: str
    scope: Scope
    kl: tuple[float, float, float]
    """Mean over positions with its 95 % interval over sequences."""
    perplexity: tuple[float, float, float] | None
    """Ratio after / before with its interval; None for prompts, which have no following token."""
    lost: tuple[float, float, float]
    n_sequences: int
    n_tokens: int

    @property
    def finite(self) -> bool:
        """Whether everything could be measured."""
        return bool(np.isfinite([*self.kl, *(self.perplexity or ()), *self.lost]).all())

    def record(self) -> DomainDrift:
        """As it stands in the report; only for finite ones."""
        ratio = self.perplexity[0] if self.perplexity else None
        return DomainDrift(
            domain=self.domain, scope=self.scope, kl_nats=self.kl[0], kl_low=self.kl[1], kl_high=self.kl[2],
            perplexity_ratio=ratio, lost_top1=self.lost[0], n_sequences=self.n_sequences, n_tokens=self.n_tokens,
        )  # fmt: skip


def summarise(
    positions: Positions, chosen: Bool[Tensor, " n"], domain: str, scope: Scope, seed: int
) -> Summary:
    """Behaviour over the chosen positions, with sequences as units."""
    _, rows = positions.sequence[chosen].unique(return_inverse=True)
    n_rows = int(rows.max()) + 1 if len(rows) else 0
    follows = chosen & ~positions.nll_before.isnan()

    def per_row(values: Tensor, which: Tensor) -> Floats:
        index = rows[which[chosen]]
        sums: Floats = (
            torch.zeros(n_rows, dtype=torch.float64).index_add(0, index, values[which].double()).numpy()
        )
        return sums

    counts = per_row(torch.ones_like(positions.kl_nats), chosen)
    gain = positions.nll_after - positions.nll_before
    ratio = None
    if bool(follows.any()):
        logs = _mean(per_row(gain, follows), per_row(torch.ones_like(positions.kl_nats), follows), seed)
        ratio = (_exp(logs[0]), _exp(logs[1]), _exp(logs[2]))
    lost = _mean(per_row(positions.lost, chosen), counts, seed)
    if scope != "far":
        lost = (lost[0], *wilson(lost[0], n_rows))
    kl = _mean(per_row(positions.kl_nats, chosen), counts, seed)
    return Summary(domain, scope, kl, ratio, lost, n_rows, int(chosen.sum()))


def _mean(sums: Floats, counts: Floats, seed: int) -> tuple[float, float, float]:
    return (float(sums.sum() / counts.sum()), *interval(sums, counts, seed))


def _exp(value: float) -> float:
    """exp that gives infinity, which no record takes, instead of raising: the score is then missing, not small."""
    return math.exp(value) if not value > 700 else math.inf


def probe_changes(handle: ModelHandle, rows: Rows, positions: Positions, scope: Scope) -> list[ProbeChange]:
    """One entry a prompt, in the order of the rows; prompts with a NaN are left out (their scores are missing)."""
    changes = []
    for index, text in enumerate(rows.texts):
        values = [
            float(positions.p_before[index]),
            float(positions.p_after[index]),
            float(positions.kl_nats[index]),
        ]
        if np.isfinite(values).all():
            changes.append(
                ProbeChange(
                    scope=scope,
                    prompt=text,
                    before=str(handle.tokenizer.decode([int(positions.top_before[index])])),
                    after=str(handle.tokenizer.decode([int(positions.top_after[index])])),
                    p_before=values[0],
                    p_after=values[1],
                    kl_nats=values[2],
                )
            )
    return changes


@dataclass(frozen=True)
class TargetBelief:
    """How much the model believes one wording's old and new target: exp of the mean token log-probability."""

    p_new: float
    p_old: float
    paraphrase: bool

    @property
    def success(self) -> bool:
        """P(new) > P(old), as the published efficacy and paraphrase scores count it."""
        return self.p_new > self.p_old


@torch.no_grad()
def beliefs(handle: ModelHandle, targets: Sequence[Target]) -> list[TargetBelief]:
    """Both targets after every wording."""
    prompts = [t.prompt for t in targets]
    scored = handle.token_logprobs(prompts * 2, [t.new for t in targets] + [t.old for t in targets])
    p = [math.exp(float(values.double().mean())) for values in scored]
    n = len(targets)
    return [TargetBelief(p[i], p[n + i], target.paraphrase) for i, target in enumerate(targets)]


@dataclass(frozen=True)
class Distractor:
    """Near prompts with the edited sentence in front: which answers survive it, in each model."""

    n: int
    kept_before: float
    """Share whose plain top answer (reference, no sentence in front) survives the sentence in the reference."""
    kept_after: float
    lost: float
    """Of those that survive it in the reference, the share that does not in the edited model."""
    n_kept_before: int


def distractor(plain_top: Int[Tensor, " n"], positions: Positions) -> Distractor:
    """`plain_top`: the reference's top token at the same near prompts without the sentence, in the same order."""
    kept_before = positions.top_before == plain_top
    kept_after = positions.top_after == plain_top
    n, survivors = len(plain_top), int(kept_before.sum())
    lost = float((kept_before & ~kept_after).sum()) / survivors if survivors else math.nan
    return Distractor(
        n, float(kept_before.double().mean()), float(kept_after.double().mean()), lost, survivors
    )
