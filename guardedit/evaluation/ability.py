"""What a model can do beside knowing facts: count on, conclude, tell grammar from its opposite, predict text.

Editing is accused of breaking just this ("logic collapse"). Arithmetic and syllogisms are made by a seeded rule, so
that no model has seen these very items; minimal pairs and text come from files.
"""

from __future__ import annotations

import json
import lzma
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.evaluation.methods import Ask
from guardedit.evaluation.scoring import score_pairs
from guardedit.models import tokens
from guardedit.models.corpus import Batch, read_texts, tokenise_chunks
from guardedit.models.handle import ModelHandle, preserved

ITEMS = 100
"""Items a skill."""
TEXT_ROW = 128
TEXT_TOKENS = 4_096
"""Tokens that perplexity is read from."""
_GROUPS = (
    "baker",
    "singer",
    "farmer",
    "painter",
    "doctor",
    "lawyer",
    "sailor",
    "writer",
    "teacher",
    "hunter",
)
_NAMES = ("Anna", "Peter", "Maria", "Tom", "Julia", "Martin", "Laura", "David", "Emma", "Paul")


@dataclass(frozen=True)
class Item:
    """A stem with the right continuation and one that stands as near."""

    skill: str
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences of which one is grammatical (BLiMP, Warstadt et al. 2020)."""

    good: str
    bad: str


@dataclass(frozen=True)
class Battery:
    """What is asked."""

    items: tuple[Item, ...]
    pairs: tuple[MinimalPair, ...] = ()
    text: tuple[Batch, ...] = ()
    """Rows of held-out text."""


def battery(
    handle: ModelHandle, *, n: int = ITEMS, seed: int = 0, blimp: Path | None = None, text: Path | None = None
) -> Battery:
    """`n` items of each skill, `n` minimal pairs of the file, and 4,096 tokens of the text."""
    rows = tokenise_chunks(handle, read_texts(text), TEXT_ROW) if text is not None else iter(())
    return Battery(
        items=(*arithmetic(n, seed), *syllogisms(n, seed)),
        pairs=tuple(minimal_pairs(blimp, n, seed)) if blimp is not None else (),
        text=tuple(islice(rows, TEXT_TOKENS // (4 * TEXT_ROW))),
    )


def arithmetic(n: int, seed: int) -> Iterator[Item]:
    """The next step of a small sum: two steps are shown, the third is asked. The wrong answer is the step before."""
    draw = random.Random(f"arithmetic/{seed}")
    for _ in range(n):
        a, b, sign = draw.randint(3, 30), draw.randint(2, 9), draw.choice("+-")
        start = a + (3 * b if sign == "-" else 0)
        values = [start + (b if sign == "+" else -b) * step for step in range(4)]
        shown = "\n".join(f"{values[i]} {sign} {b} = {values[i + 1]}" for i in range(2))
        yield Item("arithmetic", f"{shown}\n{values[2]} {sign} {b} =", str(values[3]), str(values[2]))


def syllogisms(n: int, seed: int) -> Iterator[Item]:
    """Two rules and a fact; only one of the rules fits it. The wrong answer is the other rule's conclusion."""
    draw = random.Random(f"syllogisms/{seed}")
    for _ in range(n):
        kind, right, other, wrong = draw.sample(_GROUPS, 4)
        rules = [f"All {kind}s are {right}s.", f"All {other}s are {wrong}s."]
        draw.shuffle(rules)
        name = draw.choice(_NAMES)
        fact = f"{name} is a {kind}. Therefore, {name} is also a"
        yield Item("syllogisms", f"{' '.join(rules)} {fact}", right, wrong)


def minimal_pairs(path: Path, n: int, seed: int) -> list[MinimalPair]:
    """`n` pairs of a `.jsonl` or `.jsonl.xz` file with the fields "good" and "bad" ("sentence_good", "sentence_bad" in
    BLiMP's own files), drawn with the seed. Raises BadRequestError where there is no such pair."""
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        found = [_pair(json.loads(line)) for line in text.split("\n") if line.strip()]
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise BadRequestError(f"{path.name} cannot be read as minimal pairs: {error}") from error
    if not found:
        raise BadRequestError(f"{path.name} holds no minimal pair")
    return random.Random(seed).sample(found, min(n, len(found)))


def _pair(record: dict[str, Any]) -> MinimalPair:
    good, bad = (record[side if side in record else f"sentence_{side}"] for side in ("good", "bad"))
    return MinimalPair(str(good), str(bad))


def measure(handle: ModelHandle, asked: Battery, ask: Ask) -> dict[str, tuple[float, ...]]:
    """A value an item: 1 for right and 0 for wrong; `perplexity_held_out` as nats per token, a value a row.

    An item is right where its right continuation is the likelier one, a pair where its good sentence is.
    """
    found: dict[str, list[float]] = {}
    for item, value in zip(asked.items, _right(handle, asked.items, ask), strict=True):
        found.setdefault(f"ability_{item.skill}", []).append(value)
    if asked.pairs:
        good = sentence_logprobs(handle, [ask(pair.good) for pair in asked.pairs])
        bad = sentence_logprobs(handle, [ask(pair.bad) for pair in asked.pairs])
        found["ability_minimal_pairs"] = [float(g > b) for g, b in zip(good, bad, strict=True)]
    losses = [value for batch in asked.text for value in _row_losses(handle, *batch)]
    if losses and all(map(math.isfinite, losses)):
        found["perplexity_held_out"] = losses
    return {name: tuple(values) for name, values in found.items()}


def _right(handle: ModelHandle, items: Sequence[Item], ask: Ask) -> list[float]:
    pairs = [(ask(item.prompt), target) for item in items for target in (item.right, item.wrong)]
    scores = [found.logprob for found in score_pairs(handle, pairs)]
    return [
        float(right is not None and wrong is not None and right > wrong)
        for right, wrong in zip(scores[::2], scores[1::2], strict=True)
    ]


def sentence_logprobs(handle: ModelHandle, sentences: Sequence[str], batch_size: int = 32) -> list[float]:
    """Log-probability in nats of each sentence after its first token, in the order given."""
    rows = [tokens.tokenise(handle, sentence) for sentence in sentences]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    found: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = tokens.pad(handle, [rows[index] for index in chunk])
        sums = _token_losses(handle, batch["input_ids"], batch["attention_mask"]).sum(1)
        found.update(zip(chunk, (-float(value) for value in sums), strict=True))
    return [found[index] for index in range(len(sentences))]


def _row_losses(handle: ModelHandle, ids: Tensor, mask: Tensor) -> list[float]:
    """Nats per token, a row each."""
    sums = _token_losses(handle, ids, mask).sum(1)
    return [float(total) / (int(count) - 1) for total, count in zip(sums, mask.sum(1), strict=True)]


@torch.no_grad()
def _token_losses(handle: ModelHandle, ids: Tensor, mask: Tensor) -> Tensor:
    """−log P of each token after a row's first, in nats, (batch, seq − 1), 0 where padded."""
    follows = mask[:, 1:].bool()
    where = torch.zeros_like(mask, dtype=torch.bool)
    where[:, :-1] = follows
    with preserved(handle):
        logits = handle.logits_at(handle.hidden(ids, mask), where).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][follows], reduction="none")
    return torch.zeros(follows.shape, dtype=torch.float64, device=ids.device).masked_scatter(
        follows, losses.double()
    )
