"""Choose the settings of EMMET, MEMIT and AlphaEdit on batches of facts: values once, then every setting on the same.

    python -m benchmarks.batch_sweep values --data ../shared/data --out OUT
    python -m benchmarks.batch_sweep sweep  --data ../shared/data --out OUT
    python -m benchmarks.batch_sweep table  --out OUT

Facts: CounterFact `train`, true object known to the model (greedy), drawn by seed 0 as `reference_bank` draws them,
numbers 121 to 170 of its list: neither the bank's hundred nor those that fine-tuning was tuned on. Resumable: what
lies in OUT is not computed again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reference_bank import cases_of
from guardedit.edits.keys import keys_of
from guardedit.edits.values import Value, optimise_values
from guardedit.evaluation.readers import EvalCase
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard

FIRST, LAST = 120, 170
CHUNK = 10
"""Facts whose values are found before they are saved."""


def solve_values(guard: Guard, cases: list[EvalCase], out: Path) -> None:
    """Optimise and store the value of every fact, with ROME's settings."""
    settings, layer = guard.kit.settings("rome"), guard.kit.layer
    for start in range(0, len(cases), CHUNK):
        path = out / "values" / f"{start:03d}.safetensors"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        requests = [case.request for case in cases[start : start + CHUNK]]
        keys = keys_of(guard.handle, requests, layer, settings.contexts)
        found = optimise_values(guard.handle, requests, keys, layer, settings.contexts, settings)
        save_file(_packed(found), path)


def _packed(values: tuple[Value, ...]) -> dict[str, Tensor]:
    plain = [[len(v.losses), v.losses[0], v.losses[-1], v.kl_nats, v.p_new, v.clamped] for v in values]
    return {
        "residuals": torch.stack([value.residual for value in values]).contiguous(),
        "plain": torch.tensor(plain, dtype=torch.float64),
    }


def stored_values(out: Path) -> list[Value]:
    """The values in the facts' order."""
    found = []
    for path in sorted((out / "values").glob("*.safetensors")):
        tensors = load_file(path)
        for residual, row in zip(tensors["residuals"], tensors["plain"].tolist(), strict=True):
            losses = (row[1], *[float("nan")] * (int(row[0]) - 2), row[2])
            found.append(Value(residual, losses, row[3], row[4], bool(row[5])))
    return found


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("values",))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    guard = open_guard(home=args.out / "home")
    cases = cases_of(guard, args.data, args.out, LAST)[FIRST:]
    solve_values(guard, cases, args.out)
    print(json.dumps({"facts": len(cases)}))


if __name__ == "__main__":
    main()
