"""How good a map is on facts that it was not trained on: the figures of its card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.pushed_rows import PushedBatch, PushedRow, make_batches
from guardedit.edits.remedi_loss import kept_kl, target_logprobs
from guardedit.edits.remedi_map import Share
from guardedit.edits.remedi_rows import pair_row, wordings
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest

RESAMPLES, ROWS = 10_000, 32


@dataclass(frozen=True)
class Asked:
    """One fact with its direction added at the subject."""

    p_new: float
    """Geometric mean of the new target's tokens, behind the prompt."""
    holds: bool
    """Per token, the new target is likelier than the old one there."""
    paraphrased: tuple[bool, ...]
    """The same behind each paraphrase that names the subject."""
    kept_kl_nats: float | None
    """KL(before ‖ after), mean over the tokens between the subject and the prompt's end; None without any."""


def ask(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    directions: Float[Tensor, "n d_model"],
    hook_name: str,
) -> tuple[Asked, ...]:
    """What every fact's direction does at its subject's last token; the model is left as it was.

    Requests must name their old targets. Raises BadRequestError where a push at the hook cannot reach the prompt's end.
    """
    rows, named = _rows(handle, requests)
    with preserved(handle), torch.no_grad():
        batches = make_batches(handle, rows, hook_name, ROWS)
        found = [_of_batch(handle, batch, directions) for batch in batches]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids) - rows[i].at, rows[i].at, i))
    scores = dict(zip((named[i] for i in order), (one for batch in found for one in batch), strict=True))
    return tuple(_asked(scores, fact, len(wordings(request))) for fact, request in enumerate(requests))


def _rows(
    handle: ModelHandle, requests: Sequence[EditRequest]
) -> tuple[list[PushedRow], list[tuple[int, int, bool]]]:
    """Rows, and for each (fact, wording, whether it ends in the new target)."""
    rows, named = [], []
    for fact, request in enumerate(requests):
        for wording, (prompt, start) in enumerate(wordings(request)):
            for target in (request.target_new, request.target_true or ""):
                rows.append(pair_row(handle, fact, request, prompt, start, target))
                named.append((fact, wording, target == request.target_new))
    return rows, named


def _of_batch(
    handle: ModelHandle, batch: PushedBatch, directions: Tensor
) -> list[tuple[float, float | None]]:
    """Per row, the target's mean log-probability a token and the mean KL a kept token."""
    hidden = batch.hidden(directions[batch.fact_of])
    logprobs = target_logprobs(handle, batch, hidden).double() * batch.target_weights.double()
    means = torch.zeros(batch.n_rows, dtype=torch.float64).index_add(
        0, batch.targets[0].cpu(), logprobs.cpu()
    )
    kl = kept_kl(handle, batch, hidden).double().cpu()
    kept_rows = batch.kept[0].cpu()
    counts = kept_rows.bincount(minlength=batch.n_rows)
    sums = torch.zeros(batch.n_rows, dtype=torch.float64).index_add(0, kept_rows, kl)
    pairs = zip(means.tolist(), sums.tolist(), counts.tolist(), strict=True)
    return [(mean, total / n if n else None) for mean, total, n in pairs]


def _asked(
    scores: dict[tuple[int, int, bool], tuple[float, float | None]], fact: int, n_wordings: int
) -> Asked:
    leads = [scores[fact, i, True][0] > scores[fact, i, False][0] for i in range(n_wordings)]
    new, kept = scores[fact, 0, True]
    return Asked(math.exp(new), leads[0], tuple(leads[1:]), kept)


def efficacy(asked: Sequence[Asked], seed: int) -> Share:
    """Share of facts whose new target leads behind their prompts."""
    return _share([float(one.holds) for one in asked], seed)


def paraphrase(asked: Sequence[Asked], seed: int) -> Share | None:
    """The same behind paraphrases, a mean a fact; None where no fact has one."""
    means = [sum(one.paraphrased) / len(one.paraphrased) for one in asked if one.paraphrased]
    return _share(means, seed) if means else None


def p_new(asked: Sequence[Asked], seed: int) -> Share:
    """Mean probability a token of the new target."""
    return _share([one.p_new for one in asked], seed)


def kept(asked: Sequence[Asked], seed: int) -> Share | None:
    """Mean KL a token between subject and prompt's end, a mean a fact; None where no prompt has such a token."""
    known = [one.kept_kl_nats for one in asked if one.kept_kl_nats is not None]
    return _share(known, seed) if known else None


def _share(values: Sequence[float], seed: int) -> Share:
    """Mean with its 95 % percentile bootstrap interval over facts."""
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), (0.025, 0.975))
    return Share(value=float(data.mean()), low=float(low), high=float(high), n=len(data))
