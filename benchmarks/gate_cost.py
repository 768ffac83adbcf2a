"""What a contextual edit costs a generation in which its gate is silent: paired, in turn, 200 tokens each.

    OMP_NUM_THREADS=1 python -m benchmarks.gate_cost --home HOME --plan PLAN [--pairs 10]

HOME holds a plan by `contextual` (guardedit plan … --editor contextual). CPU time of the process, so that other work
on the machine weighs on both sides alike; the order within a pair alternates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from guardedit.edits.deltas import rehearsed
from guardedit.models.handle import ModelHandle, preserved
from guardedit.pipeline import open as open_guard

PROMPTS = (
    "The weather is nice today. My garden",
    "The Eiffel Tower is located in the city of",
    "def read_lines(path):",
    "Once the train had left the station, the passengers",
    "Here is how to bake bread at home:",
)
"""About other things, about the edit's own subject outside of its context, code."""


@torch.no_grad()
def generated(handle: ModelHandle, prompt: str, n_tokens: int) -> tuple[list[int], float]:
    """Tokens and CPU seconds of one greedy generation."""
    batch = handle.encode([prompt])
    started = time.process_time()
    with preserved(handle):
        ids = handle.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=n_tokens,
            min_new_tokens=n_tokens, do_sample=False, pad_token_id=handle.tokenizer.eos_token_id,
        )  # fmt: skip
    return ids[0].tolist(), time.process_time() - started


def main() -> None:
    """Print medians and the interval of the paired ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    guard = open_guard(home=args.home)
    delta, handle = guard.read_delta(guard.read_plan(args.plan)), guard.handle
    generated(handle, PROMPTS[0], 20)
    ratios, plain, silent = [], [], []
    for pair in range(args.pairs):
        prompt, seconds, told = PROMPTS[pair % len(PROMPTS)], {}, {}
        for edited in (False, True) if pair % 2 == 0 else (True, False):
            if edited:
                with rehearsed(handle, delta):
                    told[edited], seconds[edited] = generated(handle, prompt, args.tokens)
            else:
                told[edited], seconds[edited] = generated(handle, prompt, args.tokens)
        if told[False] != told[True]:
            raise SystemExit(f"the gate spoke after {prompt!r}: this is no silent generation")
        ratios.append(seconds[True] / seconds[False])
        plain.append(seconds[False])
        silent.append(seconds[True])
    rng = np.random.default_rng(0)
    means = [float(rng.choice(ratios, len(ratios)).mean()) for _ in range(10_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    print(json.dumps({
        "pairs": args.pairs, "tokens": args.tokens, "cpu_s_plain": round(statistics.median(plain), 2),
        "cpu_s_silent": round(statistics.median(silent), 2), "ratio_mean": round(statistics.fmean(ratios), 4),
        "low": round(float(low), 4), "high": round(float(high), 4),
        "ratio_median": round(statistics.median(ratios), 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
