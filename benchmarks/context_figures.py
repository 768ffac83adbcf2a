"""What rows of benchmarks.context_table say: where gates fire, and edits beside their baselines."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.context_gates import GATES, SEED, shipped
from benchmarks.context_prompts import KINDS
from guardedit.evaluation.bootstrap import estimate

OUTSIDE = ("bare", "paraphrase", "plain opening")
"""Roles of prompts about the fact in no context at all."""


def fired(row: Mapping[str, Any], gate: str, limit: float, least: float) -> bool:
    """Whether the edit acts on the prompt."""
    return row["logit"][gate] >= limit and row["match"] >= least


def table(path: Path) -> str:
    """Gates, then edits."""
    about, rows = _rows(path)
    return "\n".join([firing_table(path), "", *_edits(rows, about)])


def _rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a file says of its run, and its rows."""
    data = path.read_bytes()
    text = lzma.decompress(data) if path.suffix == ".xz" else data
    about, *rows = [json.loads(line) for line in text.decode().splitlines()]
    return about, rows


def firing_table(path: Path) -> str:
    """Where each gate fires; what is said there too, where the rows know it."""
    about, rows = _rows(path)
    said = "after" in rows[0]
    lines = [
        "| context | gate | AUROC, held-out wordings | fires inside | fires outside (false) | bare prompts and "
        "paraphrases | other contexts | same context, other fact |"
        + (" efficacy in context |" if said else ""),
        "|" + "---|" * (9 if said else 8),
    ]
    for kind in (*KINDS, "all"):
        mine = [row for row in rows if kind in (row["edit"], "all")]
        for gate in (one for one in GATES if one in about["limits"][KINDS[0]]):
            cells = [_auroc(mine, gate) if kind != "all" else "–", *_firing(mine, gate, about, said)]
            lines.append(f"| {kind} | {gate} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _firing(mine: Sequence[dict[str, Any]], gate: str, about: Mapping[str, Any], said: bool) -> list[str]:
    """Shares of prompts in which the edit acts, by role."""
    least = about["match_least"]
    acts = [{**row, "fires": fired(row, gate, about["limits"][row["edit"]][gate], least)} for row in mine]
    shown = []
    for want in (
        lambda r: r["inside"], lambda r: not r["inside"], lambda r: r["role"] in ("bare", "paraphrase"),
        lambda r: r["role"] == "context" and not r["inside"],
        lambda r: r["role"] == "other fact" and r["kind"] == r["edit"],
    ):  # fmt: skip
        shown.append(_share([row for row in acts if want(row)], lambda row: float(row["fires"])))
    inside = [row for row in acts if row["inside"]]
    if said:
        shown.append(_share(inside, lambda row: float(row["after" if row["fires"] else "before"]["gap"] > 0)))
    return shown


def _edits(rows: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> list[str]:
    """The edit beside its baselines: what is said in the context and outside of it."""
    least, limits = about["match_least"], about["limits"]
    outside = [row for row in rows if row["role"] in OUTSIDE]
    inside = [row for row in rows if row["inside"]]
    stated = [row for row in inside if row["stated"]]

    def gated(row: Mapping[str, Any]) -> dict[str, Any]:
        gate = shipped(limits[row["edit"]])
        fires = fired(row, gate, limits[row["edit"]][gate], least)
        found: dict[str, Any] = row["after" if fires else "before"]
        return found

    told: list[tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]], Sequence[dict[str, Any]]]] = [
        ("unedited", lambda row: row["before"], inside), ("the fact in the prompt", lambda row: row["stated"], stated),
        ("plain ROME (the same update, no gate)", lambda row: row["after"], inside), ("contextual", gated, inside),
    ]  # fmt: skip
    lines = [
        "| method | in context: P(new) > P(old) | says the new one | outside: P(old) > P(new) | says the old one |"
    ]
    lines.append("|" + "---|" * 5)
    for name, side, some in told:
        beside = outside if name != "the fact in the prompt" else []
        cells = [
            _share(some, lambda row, side=side: float(side(row)["gap"] > 0)),  # type: ignore[misc]
            _share(some, lambda row, side=side: float(side(row)["new"])),  # type: ignore[misc]
            _share(beside, lambda row, side=side: float(side(row)["gap"] < 0)),  # type: ignore[misc]
            _share(beside, lambda row, side=side: float(side(row)["old"])),  # type: ignore[misc]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _share(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    """Mean over prompts, with the interval over facts."""
    if not rows:
        return "–"
    by_case: dict[Any, list[float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(value(row))
    found = estimate([sum(values) / len(values) for values in by_case.values()], SEED)
    return "–" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f}; n {len(rows)})"


def _auroc(rows: Sequence[dict[str, Any]], gate: str) -> str:
    """In the context against bare, paraphrased, plainly opened prompts and other contexts, of the same facts."""
    used = [row for row in rows if row["role"] != "other fact"]
    cases = sorted({row["case"] for row in used})
    by_case = {case: [row for row in used if row["case"] == case] for case in cases}

    def area(some: Sequence[Any]) -> float:
        drawn = [row for case in some for row in by_case[case]]
        return float(roc_auc_score([row["inside"] for row in drawn], [row["logit"][gate] for row in drawn]))

    rng = np.random.default_rng(SEED)
    draws = [area(rng.choice(cases, len(cases))) for _ in range(300)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{area(cases):.3f} ({low:.3f} to {high:.3f})"
