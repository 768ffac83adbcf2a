"""Make the generated world's model: text, edits, tokenizer and a small trained GPT-2, all from one seed.

    python -m benchmarks.world_model OUT [--seed 0] [--tokens 1300000]

OUT gets `model/` (an ordinary Hugging Face folder), `facts.jsonl` (edits for `evaluate guard`), `text/` (a file a
domain, for second moments and SAEs), `far/` (text that training did not see) and `recall.json`: which share of the
facts the model knows. One thread, so that the same machine makes the same weights again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.world import World, edits, make_world, pairs_of, prompt_of
from benchmarks.world_relations import BASE, DERIVED
from benchmarks.world_text import far_texts, texts

END = "<|endoftext|>"
SHARES = {"world": 0.86, "code": 0.06, "manual": 0.06, "sums": 0.02}
"""Of the training tokens."""
SHAPES = ((16, 64), (16, 64), (16, 64), (4, 256))
"""Rows and tokens of a step, in turn: short rows for many sentence starts, long ones for every position."""


@dataclass(frozen=True)
class Shape:
    """Size of the model and of its training."""

    layers: int = 4
    width: int = 96
    heads: int = 4
    positions: int = 256
    vocabulary: int = 1800
    tokens: int = 1_300_000
    documents: int = 3_000
    learning_rate: float = 3e-3


def make_tokenizer(pieces: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE as GPT-2 has it, trained on the pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, bos_token=END, pad_token=END)


def make_model(size: int, shape: Shape, seed: int, end: int) -> Any:
    """An untrained GPT-2 of this shape, float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size, n_positions=shape.positions, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Stream:
    """Token ids of one domain, documents behind one another."""

    ids: np.ndarray
    starts: np.ndarray
    """Where documents begin."""

    @classmethod
    def of(cls, tokenizer: Any, documents: Sequence[str], end: int) -> Stream:
        """Every document with the end token behind it."""
        rows = [[*ids, end] for ids in tokenizer(list(documents))["input_ids"]]
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return cls(np.concatenate([np.array(row) for row in rows]), starts)

    def rows(self, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """(count, length): rows that begin where a document does."""
        wrapped = np.concatenate([self.ids, self.ids[:length]])
        return np.stack([wrapped[at : at + length] for at in rng.choice(self.starts, count)])


def batches(streams: dict[str, Stream], tokens: int, seed: int) -> Iterator[torch.Tensor]:
    """(rows, length) token ids until `tokens` were seen; the domains of the rows are drawn by their shares."""
    rng, seen, step = np.random.default_rng(seed), 0, 0
    names = list(SHARES)
    while seen < tokens:
        count, length = SHAPES[step % len(SHAPES)]
        counts = rng.multinomial(count, [SHARES[name] for name in names])
        rows = [streams[name].rows(n, length, rng) for name, n in zip(names, counts, strict=True) if n]
        yield torch.from_numpy(np.concatenate(rows))
        seen, step = seen + count * length, step + 1


def train(model: Any, streams: dict[str, Stream], shape: Shape, seed: int) -> None:
    """AdamW with a warm-up and a cosine, forward passes in bfloat16."""
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=shape.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    total = sum(1 for _ in range(0, shape.tokens, SHAPES[0][0] * SHAPES[0][1]))
    model.train()
    for step, ids in enumerate(batches(streams, shape.tokens, seed)):
        done = step / total
        for group in optimiser.param_groups:
            group["lr"] = shape.learning_rate * min(done / 0.04, (1 + math.cos(math.pi * done)) / 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step} of {total}: {loss.item():.3f} nats", flush=True)
    model.eval()


def recall(folder: Path, world: World) -> dict[str, dict[str, float]]:
    """Share of facts whose whole object is decoded greedily, by kind of fact: the edit prompt, another wording that the
    text has, one that it holds out, and derived facts that the text says or does not say."""
    from guardedit.evaluation.scoring import score_pairs
    from guardedit.models.sources import load

    handle, rng = load(str(folder)), random.Random(0)
    asked: dict[str, list[tuple[str, str]]] = {}
    for one in (*BASE, *DERIVED):
        for subject in world.names[one.subjects]:
            target = world.answer(one.name, subject)
            wording, opening = rng.choice(pairs_of(one, held_out=True))
            held = prompt_of(one, wording, subject, opening)
            kind = "unstated" if (one.name, subject) in world.unstated else "derived" if one.path else "fact"
            asked.setdefault(kind, []).append((prompt_of(one, 0, subject), target))
            asked.setdefault(f"{kind}, held-out wording", []).append((held, target))
    found = {}
    for kind, pairs in asked.items():
        right = [score.greedy for score in score_pairs(handle, pairs)]
        found[kind] = {"known": sum(right) / len(right), "n": len(right)}
    return found


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make(out: Path, seed: int = 0, shape: Shape | None = None) -> dict[str, dict[str, float]]:
    """Everything that the head of this file names; returns what the model knows."""
    shape = shape or Shape()
    torch.set_num_threads(1)
    world = make_world(seed)
    mix = texts(world, shape.documents)
    write_lines(out / "facts.jsonl", edits(world))
    for folder, domains in (("text", mix), ("far", far_texts(world))):
        for name, pieces in domains.items():
            write_lines(out / folder / f"{name}.jsonl", ({"text": piece} for piece in pieces))
    tokenizer = make_tokenizer((piece for pieces in mix.values() for piece in pieces), shape.vocabulary)
    end = tokenizer.eos_token_id
    model = make_model(len(tokenizer), shape, seed, end)
    train(model, {name: Stream.of(tokenizer, pieces, end) for name, pieces in mix.items()}, shape, seed)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    found = recall(out / "model", world)
    (out / "recall.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def main() -> None:
    """Parse and make."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=Shape.tokens)
    args = parser.parse_args()
    for kind, found in make(args.out, args.seed, Shape(tokens=args.tokens)).items():
        print(f"{kind}: {found['known']:.3f} of {found['n']:.0f}")


if __name__ == "__main__":
    main()
