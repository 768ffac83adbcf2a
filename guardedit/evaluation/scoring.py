"""Score targets after prompts: what every metric is made of.

A layout is made once and run on the model before and after an edit, so both sides see the same rows, padding and
batches. A row that is the beginning of another one of the same prompt (with a one-token and a two-token target) is not
run by itself: attention is causal, so the longer row holds its answer. Rows of different prompts stay apart: an
activation edit decides from the whole prompt, and from nothing behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.models import tokens
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.installed import deciding
from guardedit.records import Record

Pair = tuple[str, str]
"""A prompt and a target."""


class TargetScore(Record):
    """One target after one prompt."""

    logprob: float | None
    """Mean log-probability of its tokens, in nats; None where that is not a finite number."""
    greedy: bool
    """Every token of it is the model's most likely one: greedy decoding would begin with this target."""
    matched: float | None = None
    """Share of its tokens that are the model's most likely ones, each after the right ones before it."""

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
    """Position that predicts the target's first token: the prompt's last."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Rows to run, in batches, and where to read each pair's answer and each prompt's end."""

    batches: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    targets: tuple[_Target, ...]
    prompt_lengths: tuple[int, ...]
    """A row each: tokens of its prompt."""
    ends: tuple[tuple[int, int], ...] = ()
    """(row, position) of each prompt's last token."""

    @property
    def n_tokens(self) -> int:
        """Tokens that one run takes through the model, padding not counted."""
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True, eq=False)
class Scored:
    """What one run of a layout gives."""

    targets: tuple[TargetScore, ...]
    """In the order of the pairs."""
    ends: Float[Tensor, "n d_model"]
    """Final hidden state at each prompt's end, from which its next-token distribution follows."""


def lay_out(
    handle: ModelHandle, pairs: Sequence[Pair], batch_size: int = 32, ends: Sequence[str] = ()
) -> Layout:
    """Tokenise the pairs, and the prompts whose `ends` are wanted, into few rows; see the module's head."""
    wanted = [_split(handle, prompt, target) for prompt, target in pairs]
    bare = [tuple(tokens.tokenise(handle, prompt).ids) for prompt in ends]
    asked = {(row, first + 1) for row, first, _ in wanted} | {(row, len(row)) for row in bare}
    rows, lengths, carrier = _merge(asked)
    targets = tuple(_Target(carrier[row, first + 1], first, ids) for row, first, ids in wanted)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = tuple(tuple(order[at : at + batch_size]) for at in range(0, len(order), batch_size))
    at = tuple((carrier[row, len(row)], len(row) - 1) for row in bare)
    return Layout(batches, rows, targets, lengths, at)


def run(handle: ModelHandle, layout: Layout) -> Scored:
    """Run the layout once; the model is left as it was."""
    found: dict[int, TargetScore] = {}
    ends: dict[int, Tensor] = {}
    with preserved(handle), torch.no_grad():
        for batch in layout.batches:
            hidden, local = _hidden(handle, layout, batch)
            found.update(_score_batch(handle, layout, hidden, local))
            ends |= {
                index: hidden[local[row], at] for index, (row, at) in enumerate(layout.ends) if row in local
            }
    states = [ends[index] for index in range(len(layout.ends))]
    empty = torch.empty(0, handle.d_model, device=handle.device)
    return Scored(
        tuple(found[index] for index in range(len(layout.targets))), torch.stack(states) if states else empty
    )


def score(handle: ModelHandle, layout: Layout) -> list[TargetScore]:
    """Score every pair of the layout, in the order in which they were given; the model is left as it was."""
    return list(run(handle, layout).targets)


def score_pairs(handle: ModelHandle, pairs: Sequence[Pair], batch_size: int = 32) -> list[TargetScore]:
    """`score` of a layout that is used once."""
    return score(handle, lay_out(handle, pairs, batch_size))


def _split(handle: ModelHandle, prompt: str, target: str) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Row without the last target token (it predicts nothing that is asked for), first reading position, target ids."""
    pair = handle.encode_pairs([prompt], [target])
    ids, mask = pair["input_ids"][0].tolist(), pair["target_mask"][0]
    start = int(mask.nonzero()[0])
    return tuple(ids[:-1]), start - 1, tuple(ids[start:])


def _merge(
    asked: set[tuple[tuple[int, ...], int]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], dict[tuple[tuple[int, ...], int], int]]:
    """Of rows with their prompts' lengths, those that are no beginning of another with a prompt as long; their prompts'
    lengths; and for every row the index of one that holds it."""
    holds: dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]] = {}
    last: dict[int, tuple[int, ...]] = {}
    # Sorted backwards, a row comes directly after one that it is the beginning of, if there is any.
    for row, length in sorted(asked, reverse=True):
        if last.get(length, ())[: len(row)] != row:
            last[length] = row
        holds[row, length] = last[length], length
    kept = sorted(set(holds.values()), reverse=True)
    number = {one: index for index, one in enumerate(kept)}
    rows, lengths = (row for row, _ in kept), (length for _, length in kept)
    return tuple(rows), tuple(lengths), {one: number[held] for one, held in holds.items()}


def _hidden(handle: ModelHandle, layout: Layout, batch: tuple[int, ...]) -> tuple[Tensor, dict[int, int]]:
    """Final hidden states of one batch of rows, and row -> place in it."""
    rows = [tokens.Tokens(list(layout.rows[i]), [(0, 0)] * len(layout.rows[i])) for i in batch]
    padded = tokens.pad(handle, rows)
    columns = torch.arange(padded["input_ids"].shape[1])
    prompts = columns < torch.tensor([layout.prompt_lengths[i] for i in batch])[:, None]
    with deciding(handle, prompts):
        hidden = handle.hidden(padded["input_ids"], padded["attention_mask"])
    return hidden, {row: at for at, row in enumerate(batch)}


def _score_batch(
    handle: ModelHandle, layout: Layout, hidden: Tensor, local: dict[int, int]
) -> dict[int, TargetScore]:
    """Pair index -> score, for the pairs that are read from this batch's rows."""
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
    matched = float((rows.argmax(-1) == wanted).double().mean()) if finite else 0.0
    return TargetScore(logprob=mean if finite else None, greedy=matched == 1.0, matched=matched)
