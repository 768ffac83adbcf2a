"""Print the table of docs/layer.md from the rows of a layer sweep.

python -m benchmarks.layer_table docs/data/layer_sweep.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from math import exp
from pathlib import Path
from typing import Any

from guardedit.evaluation.bootstrap import estimate

SEED = 0
HEAD = (
    "layer",
    "n",
    "efficacy",
    "paraphrase",
    "neighborhood",
    "harmonic mean",
    "P(new)",
    "‖ΔW‖/‖W‖",
    "steps",
)


def cell(values: list[float]) -> tuple[float, str]:
    """Mean, and mean with its 95 % bootstrap interval over cases."""
    found = estimate(values, SEED)
    if found is None:
        return 0.0, "–"
    return found.value, f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


def neighborhood(row: dict[str, Any]) -> float:
    """Share of a case's neighbours that keep their answer."""
    return sum(row["neighborhood"]) / len(row["neighborhood"])


def line(name: str, rows: list[dict[str, Any]], edited: bool) -> str:
    """One line of the table: a layer, or the unedited model."""
    means, cells = [], []
    for values in (
        [float(row["efficacy"]) for row in rows],
        [float(row["paraphrase"]) for row in rows],
        [neighborhood(row) for row in rows],
    ):
        mean, text = cell(values)
        means.append(mean)
        cells.append(text)
    harmonic = 3 / sum(1 / mean for mean in means) if all(means) else 0.0
    extra = ["–"] * 2
    if edited:
        ratios, steps = [row["delta_norm_ratio"] for row in rows], [row["steps"] for row in rows]
        extra = [f"{sum(ratios) / len(ratios):.3f}", f"{sum(steps) / len(steps):.1f}"]
    p_new = sum(exp(row["p_new_log"]) for row in rows) / len(rows)
    return " | ".join([f"| {name}", str(len(rows)), *cells, f"{harmonic:.3f}", f"{p_new:.2f}", *extra]) + " |"


def main() -> None:
    """Read the rows and print the table."""
    by_layer: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for text in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        by_layer[row["layer"]].append(row)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    first = next(iter(by_layer.values()))
    lines.append(line("unedited", [row["base"] for row in first], edited=False))
    lines += [line(str(layer), rows, edited=True) for layer, rows in sorted(by_layer.items())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
