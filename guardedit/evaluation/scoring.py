"""Score targets after prompts: what every metric is made of.

A layout is made once and run on the model before and after an edit, so both sides see the same rows, padding and
batches. A row that is the beginning of another one (the same prompt with a one-token and a two-token target) is not
run by itself: attention is causal, so the longer row holds its answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guardedit.models import tokens
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import Record

Pair = tuple[str, str]
"""A prompt and a target."""


class TargetScore(Record):
    """One target after one prompt."""

    logprob: float | None
    """Mean log-probability of its tokens, in nats; None where that is not a finite number."""
    greedy: bool
    """Every token of it is the model's most likely one: greedy decoding would begin with this target."""

    @property
    def probability(self) -> float | None:
        """Geometric mean of its tokens' probabilities: P(o) of Meng et al. 2022, appendix B.1."""
        return None if self.logprob is None else math.exp(self.logprob)


@dataclass(frozen=True)
class _Target:
    """Where one pair's answer is read."""

    row: int
    """Index into the layout's rows."""
    first: int
    """Position that predicts the target's first token."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Rows to run, in batches, and where to read each pair's answer."""

    batches: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    targets: tuple[_Target, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that one run takes through the model, padding not counted."""
        return sum(len(row) for row in self.rows)


def lay_out(handle: ModelHandle, pairs: Sequence[Pair], batch_size: int = 32) -> Layout:
    """Tokenise the pairs and arrange them into few rows; see the module's head."""
    wanted = [_split(handle, prompt, target) for prompt, target in pairs]
    rows, carrier = _merge({row for row, _, _ in wanted})
    targets = tuple(_Target(carrier[row], first, ids) for row, first, ids in wanted)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = tuple(tuple(order[at : at + batch_size]) for at in range(0, len(order), batch_size))
    return Layout(batches, tuple(rows), targets)


def score(handle: ModelHandle, layout: Layout) -> list[TargetScore]:
    """Score every pair of the layout, in the order in which they were given; the model is left as it was."""
    found: dict[int, TargetScore] = {}
    with preserved(handle), torch.no_grad():
        for batch in layout.batches:
            found.update(_score_batch(handle, layout, batch))
    return [found[index] for index in range(len(layout.targets))]


def score_pairs(handle: ModelHandle, pairs: Sequence[Pair], batch_size: int = 32) -> list[TargetScore]:
    """`score` of a layout that is used once."""
    return score(handle, lay_out(handle, pairs, batch_size))


def _split(handle: ModelHandle, prompt: str, target: str) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Row without the last target token (it predicts nothing that is asked for), first reading position, target ids."""
    pair = handle.encode_pairs([prompt], [target])
    ids, mask = pair["input_ids"][0].tolist(), pair["target_mask"][0]
    start = int(mask.nonzero()[0])
    return tuple(ids[:-1]), start - 1, tuple(ids[start:])


def _merge(rows: set[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The rows that are no beginning of another, and for every row the index of one that holds it."""
    kept: list[tuple[int, ...]] = []
    carrier: dict[tuple[int, ...], int] = {}
    # Sorted backwards, a row comes directly after one that it is the beginning of, if there is any.
    for row in sorted(rows, reverse=True):
        if not kept or kept[-1][: len(row)] != row:
            kept.append(row)
        carrier[row] = len(kept) - 1
    return kept, carrier


def _score_batch(handle: ModelHandle, layout: Layout, batch: tuple[int, ...]) -> dict[int, TargetScore]:
    """Pair index -> score, for the pairs that are read from this batch's rows."""
    rows = [tokens.Tokens(list(layout.rows[i]), [(0, 0)] * len(layout.rows[i])) for i in batch]
    padded = tokens.pad(handle, rows)
    hidden = handle.hidden(padded["input_ids"], padded["attention_mask"])
    local = {row: at for at, row in enumerate(batch)}
    mine = [(index, target) for index, target in enumerate(layout.targets) if target.row in local]
    needed = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    for _, target in mine:
        needed[local[target.row], target.first : target.first + len(target.ids)] = True
    logprobs = handle.logits_at(hidden, needed).float().log_softmax(-1)
    index_of = needed.flatten().cumsum(0).view(needed.shape) - 1
    return {
        index: _read(
            logprobs, index_of[local[target.row], target.first : target.first + len(target.ids)], target.ids
        )
        for index, target in mine
    }


def _read(logprobs: Tensor, positions: Tensor, ids: tuple[int, ...]) -> TargetScore:
    rows, wanted = logprobs[positions], torch.tensor(ids, device=logprobs.device)
    mean = float(rows.gather(-1, wanted[:, None]).double().mean())
    finite = math.isfinite(mean)
    return TargetScore(
        logprob=mean if finite else None, greedy=finite and bool((rows.argmax(-1) == wanted).all())
    )
