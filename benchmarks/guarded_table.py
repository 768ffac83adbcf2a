"""Print the table of docs/guarded.md: one row a variant of the value, from what each fact gave.

    python -m benchmarks.guarded_table docs/data/guarded_ablation.jsonl

A line holds a variant's name, its facts (A or B, see the page), its CPU seconds an edit and one record a fact.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from guardedit.evaluation.bootstrap import estimate

COLUMNS = {"para": "paraphrase", "skl": "same-subject KL, nats", "slost": "same-subject lost top-1"}
SEED = 0


def cell(rows: list[dict[str, Any]], name: str) -> str:
    """Mean over facts with its 95 % bootstrap interval."""
    found = estimate([row[name] for row in rows], SEED, share=name != "skl")
    return "" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def main() -> None:
    """Read the variants and print the table."""
    print("| facts | value | n | P(new) | " + " | ".join(COLUMNS.values()) + " | CPU s |")
    print("|" + "---|" * (len(COLUMNS) + 5))
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        variant = json.loads(line)
        rows = variant["rows"]
        p_new = sum(row["p"] for row in rows) / len(rows)
        cells = " | ".join(cell(rows, name) for name in COLUMNS)
        seconds = variant["cpu_s_per_edit"] or ""
        print(
            f"| {variant['facts']} | {variant['value']} | {len(rows)} | {p_new:.2f} | {cells} | {seconds} |"
        )


if __name__ == "__main__":
    main()
