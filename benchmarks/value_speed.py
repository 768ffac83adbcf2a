"""CPU seconds a value: all contexts from the start, and a start on two of them, on the same facts in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.value_speed --bank OUT

`OUT` is the folder of `benchmarks.reference_bank solve` (its cases.jsonl); the 21st to 36th fact are taken.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from guardedit.edits.keys import keys_of
from guardedit.edits.values import optimise_values
from guardedit.evaluation.cases import EvalCase
from guardedit.pipeline import open as open_guard

FIRST, LAST = 20, 36


def main() -> None:
    """One JSON line a setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, required=True)
    args = parser.parse_args()
    guard = open_guard(home=args.bank / "home")
    lines = (args.bank / "cases.jsonl").read_text().splitlines()[FIRST:LAST]
    requests = [EvalCase.model_validate_json(line).request for line in lines]
    settings = guard.kit.settings("rome")
    keys = keys_of(guard.handle, requests, settings.layer, settings.contexts)
    for warm in (0, 2):
        named = replace(settings, warm_contexts=warm)
        started = time.process_time()
        found = optimise_values(guard.handle, requests, keys, named.layer, named.contexts, named)
        seconds = (time.process_time() - started) / len(requests)
        steps = sum(len(value.losses) - 1 for value in found) / len(found)
        print(json.dumps({"warm_contexts": warm, "n": len(found), "cpu_s_a_value": seconds, "steps": steps}))


if __name__ == "__main__":
    main()
