"""What each edit of the race cost, and the tables of docs/peers.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from guardedit.evaluation.bootstrap import estimate

Line = dict[str, Any]
SHARES = ("efficacy", "paraphrase", "neighborhood", "distractor_neighborhood", "p_new")
HEAD = (
    "method",
    "n",
    *SHARES,
    "NLL change, median (largest)",
    "‖ΔW‖/‖W‖, largest",
    "CPU s an edit",
    "times ours",
)


def costs(rows: Sequence[Line]) -> list[dict[str, Line]]:
    """Of each solve, fact -> what its edit cost: its share of the solve and its value.

    Where values were found beforehand their time is added: our own was measured, the peer's is that of its first run
    of the fact less the solve of its second run with the value at hand.
    """
    single = [
        row for row in rows if len(row["cases"]) == 1 and "values_cached" in row and "MEMIT" in row["label"]
    ]
    whole = {row["cases"][0]: row["cpu_s"] for row in single if not row["values_cached"]}
    alone = {row["cases"][0]: row["cpu_s"] for row in single if row["values_cached"]}
    values = {case: whole[case] - alone[case] for case in whole.keys() & alone.keys()}
    return [{case: _cost(row, values.get(case)) for case in row["cases"]} for row in rows]


def _cost(row: Line, value: float | None) -> Line:
    own = row["cpu_s"] / len(row["cases"])
    added = value if row.get("values_cached") else row.get("values_cpu_s", 0.0)
    kept = {name: row[name] for name in ("wall_s", "rss_mib", "gflops", "load", "steps")}
    edit = None if added is None else own + added
    return {
        "together": len(row["cases"]),
        "solve_cpu_s": own,
        "values_cpu_s": added,
        "edit_cpu_s": edit,
        **kept,
    }


def table(path: Path) -> str:
    """All facts of each method, then those that every method of EasyEdit was run on."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    named: dict[str, dict[str, Line]] = {}
    for line in lines:
        named.setdefault(line["label"], {})[line["case"]] = line
    theirs = [{*cases} for label, cases in named.items() if label.startswith("EasyEdit")]
    common = set.intersection(*theirs) if theirs else set()
    both = {label: {c: cases[c] for c in cases if c in common} for label, cases in named.items()}
    speed = [line["gflops"] for line in lines if "gflops" in line]
    load = [line["load"] for line in lines if "load" in line]
    about = (
        f"fp32 product, 1,024 x 576 by 576 x 1,536, one thread: {median(speed):.0f} GFLOP/s in the median "
        f"({min(speed):.0f} to {max(speed):.0f}); load of the machine {min(load):.1f} to {max(load):.1f}"
    )
    shared = [f"The {len(common)} facts that every method of EasyEdit was run on:", _table(both)]
    return "\n\n".join([_table(named), *(shared if theirs else ()), *_ratios(both), about])


def _ratios(named: dict[str, dict[str, Line]]) -> list[str]:
    """What an edit of EasyEdit costs beside ours by the same method, medians over the same facts."""
    found = []
    for label, cases in named.items():
        if label.startswith("EasyEdit") and "batch" not in label:
            method = label.split()[1]
            # Of one fact EMMET is ROME with a value from a warm start.
            mine = tuple(f"guardedit {one}" for one in (method, *(("EMMET",) if method == "ROME" else ())))
            told = [
                f"{name.removeprefix('guardedit ')}: {(_spent([*cases.values()]) or 0) / spent:.1f}"
                for name, ours in named.items()
                if name.startswith(mine) and (spent := _spent([*ours.values()]))
            ]
            found.append(f"{label}, times the cost of {'; '.join(told)}")
    return found


def _table(named: dict[str, dict[str, Line]]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for label, cases in named.items():
        found = [*cases.values()]
        lines.append("| " + " | ".join([label, str(len(found)), *_cells(found), _times(named, label)]) + " |")
    return "\n".join(lines)


def _cells(found: Sequence[Line]) -> list[str]:
    shares = [estimate([line[name] for line in found], 0) for name in SHARES]
    cells = ["–" if e is None else f"{e.value:.3f} ({e.low:.2f} to {e.high:.2f})" for e in shares]
    moved = [line["nll_change"] for line in found if line.get("nll_change") is not None]
    ratios = [line["delta_norm_ratio"] for line in found if "delta_norm_ratio" in line]
    spent = _spent(found)
    return [
        *cells,
        f"{median(moved):+.4f} ({max(moved):+.3f})" if moved else "–",
        f"{max(ratios):.3f}" if ratios else "–",
        "–" if spent is None else f"{spent:.1f}",
    ]


def _spent(found: Sequence[Line]) -> float | None:
    known = [line["edit_cpu_s"] for line in found if line.get("edit_cpu_s") is not None]
    return median(known) if known else None


def _times(named: dict[str, dict[str, Line]], label: str) -> str:
    """Median cost over that of the same method here with shared values; ROME's where there is no such method."""
    words = label.split()
    base = f"guardedit {words[1].rstrip(',')}, shared values" if len(words) > 1 else ""
    mine = _spent([*named.get(base, named.get("guardedit ROME, shared values", {})).values()])
    spent = _spent([*named[label].values()])
    return "–" if mine is None or spent is None else f"{spent / mine:.1f}"
