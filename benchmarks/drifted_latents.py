"""Do the scores before a write foretell how many latents drift after it? From the monitor's and the guard's rows.

    python -m benchmarks.drifted_latents docs/data/monitor_power.parquet docs/data/guard_rows.parquet

The monitor counts, scope by scope, the latents whose distribution moved significantly although nobody meant it. Here
that count is an outcome like any other: held against every score that the guard had before the write, and against the
divergence that was then measured on text and prompts that neither of the two reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.guard_sections import shown, table
from guardedit.evaluation.guard.association import Figure, figure, spearman
from guardedit.evaluation.guard.fitting import OUTCOMES
from guardedit.evaluation.guard.frames import OUT, PRED, measured, read_rows

SEED = 0
BEST = 3


def section_drifted(monitor: pd.DataFrame, rows: pd.DataFrame) -> str:
    """By scope: how many drift, what foretells it, and what it has to do with damage."""
    edits = counted(monitor, rows)
    relations = edits["relation"].to_numpy().astype(str)
    body = []
    for scope, outcome in OUTCOMES.items():
        drifted = edits[f"score.drifted_latents_{scope}"].to_numpy(dtype=float)
        damage = figure(spearman, edits[f"{OUT}{outcome}"].to_numpy(dtype=float), drifted, relations, SEED)
        low, middle, high = np.nanquantile(drifted, (0.05, 0.5, 0.95))
        body.append([
            scope, str(int(np.isfinite(drifted).sum())), f"{middle:.0f} ({low:.0f} to {high:.0f})", shown(damage),
            "; ".join(f"`{name}` {shown(one)}" for name, one in _best(edits, drifted, relations)),
        ])  # fmt: skip
    head = (
        "scope",
        "n",
        "latents that drift, median (middle 90 %)",
        "Spearman with the scope's damage",
        "best scores",
    )
    return table(head, body)


def counted(monitor: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Real edits that were monitored as they are, with no leak planted, beside what the guard's table has of them."""
    plain = monitor[(monitor["scope"] == "") & monitor["kind"].isin(["mild", "harmful"])]
    # An edit may be monitored as one of both kinds; a row that knows of namesakes is the later one.
    named = plain.get("score.namesake_kl", pd.Series(np.nan, plain.index)).notna()
    once = plain.loc[(~named).sort_values(kind="stable").index].drop_duplicates("case_id")
    return once.merge(measured(rows, "rome", ("known",)), on="case_id")


def _best(edits: pd.DataFrame, drifted: np.ndarray, relations: np.ndarray) -> list[tuple[str, Figure]]:
    found = {
        name.removeprefix(PRED): figure(spearman, edits[name].to_numpy(dtype=float), drifted, relations, SEED)
        for name in edits.columns
        if name.startswith(PRED)
    }
    known = [(name, one) for name, one in found.items() if one is not None and np.isfinite(one.value)]
    return sorted(known, key=lambda pair: -abs(pair[1].value))[:BEST]


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("monitor", type=Path)
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    print(section_drifted(pd.read_parquet(args.monitor), read_rows(args.rows)))


if __name__ == "__main__":
    main()
