"""How much faster batched causal tracing is than one restoration a pass, and that both give the same numbers.

    python -m benchmarks.tracing_speed

Both in one run, turn by turn. The batched way traces each fact whole; a plain pass costs the same whatever it restores,
so it is timed on a seeded sample of the restorations and extended to all of them. Times are the processor's, not the
clock's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.plain_tracing import plain_trace
from guardedit.evaluation.facts import read_facts, well_known
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import load
from guardedit.models.tracing import KINDS, Fact, TraceSettings, embedding_std, trace


def compare(
    handle: ModelHandle, fact: Fact, std: float, settings: TraceSettings, sample: int
) -> dict[str, float]:
    """Seconds of both ways for one fact, and the largest difference between their numbers."""
    started = time.process_time()
    found = trace(handle, fact, std, settings)
    batched = time.process_time() - started
    cells = [(kind, t, layer) for kind in KINDS for t in range(len(found.tokens)) for layer in found.layers]
    chosen = set(random.Random(0).sample(cells, sample))
    started = time.process_time()
    plain = plain_trace(handle, fact, std, settings, lambda *cell: cell in chosen)
    seconds = (time.process_time() - started) / sample * len(cells)
    differences = [
        abs(float(found.scores[kind][t, found.layers.index(layer)]) - value)
        for (kind, t, layer), value in plain.items()
    ]
    return {
        "tokens": len(found.tokens), "restorations": len(cells), "batched_seconds": batched, "plain_seconds": seconds,
        "ratio": seconds / batched, "largest_difference": max(differences),
    }  # fmt: skip


def main() -> None:
    """Compare on each fact and print a line each and the sum."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="trace every n-th layer")
    parser.add_argument("--number", type=int, default=6, help="facts, drawn by a seed")
    parser.add_argument("--facts", type=Path, help="a file of facts; default: well-known ones that ship")
    parser.add_argument("--split", help="only this split of the file")
    parser.add_argument("--sample", type=int, default=30, help="plain passes timed a fact")
    args = parser.parse_args()
    torch.set_num_threads(1)
    handle, settings = load(), TraceSettings(every=args.every)
    listed = read_facts(args.facts, args.split) if args.facts else well_known()
    std = embedding_std(handle, listed.subjects)
    rows = []
    for drawn in random.Random(0).sample(listed.facts, args.number):
        fact = replace(drawn, answer=None)
        rows.append(compare(handle, fact, std, settings, args.sample))
        print(json.dumps({"fact": fact.filled, **{k: round(v, 7) for k, v in rows[-1].items()}}), flush=True)
    batched, plain = (sum(row[name] for row in rows) for name in ("batched_seconds", "plain_seconds"))
    print(
        f"batched {batched:.0f} s, one at a time {plain:.0f} s of one processor: {plain / batched:.1f} times"
    )


if __name__ == "__main__":
    main()
