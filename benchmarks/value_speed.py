"""The value loop's cost: CPU seconds a value, and its share of this machine's own matrix-product rate.

    OMP_NUM_THREADS=1 python -m benchmarks.value_speed --bank OUT
    OMP_NUM_THREADS=1 python -m benchmarks.value_speed --facts FILE

`OUT` is the folder of `benchmarks.reference_bank solve` (its cases.jsonl), `FILE` CounterFact's short form (its `train`
split, known facts in the order of seed 0); the 21st to 36th fact are taken. Values are found with all contexts from the
start, from a start on two of them, and one at a time. FLOPs are those that torch's counter sees in a pass of its own:
products of the forward pass and of the gradient by activations, as the loop asks for no other. The machine's rate is
that of square float32 products, timed before and after: a share of 1 would be a loop of large products alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from guardedit.editors.rome import RomeHparams
from guardedit.edits.keys import keys_of
from guardedit.edits.value_types import Value
from guardedit.edits.values import optimise_values
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.strata import KNOWN, chosen_edits
from guardedit.evaluation.readers import read_cases
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest

FIRST, LAST = 20, 36
SIDE, PRODUCTS = 2048, 5
"""Square products that the machine's rate is read from, and how many of them."""


def product_rate() -> float:
    """FLOP a CPU second of square float32 products."""
    left, right = torch.randn(2, SIDE, SIDE)
    left @ right
    started = time.process_time()
    for _ in range(PRODUCTS):
        left @ right
    return PRODUCTS * 2 * SIDE**3 / (time.process_time() - started)


def counted(work: Callable[[], Any]) -> int:
    """FLOPs of the products in `work`, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def timed(work: Callable[[], tuple[Value, ...]]) -> dict[str, float]:
    """Seconds and steps a value, FLOPs, and their rate as a share of the machine's before and after."""
    before = product_rate()
    started = time.process_time()
    found = work()
    seconds = time.process_time() - started
    machine = (before + product_rate()) / 2
    flops = counted(work)
    return {
        "n": len(found),
        "cpu_s_a_value": seconds / len(found),
        "steps": sum(len(value.losses) - 1 for value in found) / len(found),
        "gflop_a_value": flops / len(found) / 1e9,
        "gflop_a_cpu_s": flops / seconds / 1e9,
        "product_gflop_a_cpu_s": machine / 1e9,
        "share": flops / seconds / machine,
    }


def settings_of(guard: Guard) -> dict[str, RomeHparams]:
    """Name -> settings."""
    plain = guard.kit.settings("rome")
    if not isinstance(plain, RomeHparams):
        raise SystemExit("the kit has no settings of ROME")
    return {
        "all contexts from the start": replace(plain, warm_contexts=0),
        "a start on two contexts": replace(plain, warm_contexts=2),
        "one fact at a time": replace(plain, warm_contexts=0, facts_at_once=1),
    }


def run(guard: Guard, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    """One row a setting, on the same facts in one process."""
    rows = []
    for name, settings in settings_of(guard).items():
        keys = keys_of(guard.handle, requests, settings.layer, settings.contexts)
        work = partial(
            optimise_values, guard.handle, requests, keys, settings.layer, settings.contexts, settings
        )
        rows.append({"setting": name, **timed(work)})
    return rows


def _requests(guard: Guard, bank: Path | None, facts: Path | None) -> list[EditRequest]:
    if bank is not None:
        lines = (bank / "cases.jsonl").read_text().splitlines()[FIRST:LAST]
        return [EvalCase.model_validate_json(line).request for line in lines]
    if facts is None:
        raise SystemExit("give --bank or --facts")
    chosen = list(chosen_edits(guard.handle, read_cases(facts, "train"), KNOWN, LAST))
    return [one.case.request for one in chosen[FIRST:]]


def main() -> None:
    """One JSON line a setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--facts", type=Path)
    parser.add_argument(
        "--home", type=Path, default=None, help="where guardedit keeps its files for this run"
    )
    args = parser.parse_args()
    guard = open_guard(home=args.bank / "home") if args.bank else open_guard()
    for row in run(guard, _requests(guard, args.bank, args.facts)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
