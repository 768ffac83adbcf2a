"""Many edits in one model, rows of `evaluate guard --batch` and `--sequence`: damage, and what single edits foretell.

An update of many edits is far larger than any single one. Does its score still say how much damage it does? For each
editor a line log(damage) = a + b log(score) is fitted on its single natural edits alone; the tables hold what was then
measured of batches and sequences, divided by what that line says of their own score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.guard_sections import table
from guardedit.evaluation.guard.association import spearman
from guardedit.evaluation.guard.fitting import OUTCOMES, natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED
from guardedit.evaluation.guard.together import BATCH, SEQUENCE
from guardedit.records import Scope

FORETELLING: dict[Scope, str] = {
    "far": "leakage", "near": "rehearsed_near_kl", "subject": "rehearsed_subject_kl",
}  # fmt: skip
"""By scope, the score whose line is drawn on: one of those that a risk model may hold, in the unit of the damage."""
SAME_AT_ONE = {"emmet": "rome"}
"""Editors whose single edits are another's by construction."""


def together(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of batches and sequences that were solved, with `kind` and `edits`."""
    parts = frame["stratum"].str.extract(rf"^({BATCH}|{SEQUENCE}) (\d+)$")
    found = frame.assign(kind=parts[0], edits=pd.to_numeric(parts[1]))
    found = found[found["kind"].notna() & found["error"].isna()]
    return found.sort_values(["editor", "kind", "edits", "case_id"], ignore_index=True)


def foretold(frame: pd.DataFrame, editor: str, scope: Scope, rows: pd.DataFrame) -> np.ndarray | None:
    """What the line of the editor's single edits says of the rows' damage, nats; None without ten single edits."""
    single = natural_edits(frame, SAME_AT_ONE.get(editor, editor))
    score = f"{PRED}{FORETELLING[scope]}"
    x, y = (single[name].to_numpy(dtype=float) for name in (score, f"{OUT}{OUTCOMES[scope]}"))
    there = (x > 0) & (y > 0)
    if there.sum() < 10:
        return None
    slope, offset = np.polyfit(np.log(x[there]), np.log(y[there]), 1)
    said: np.ndarray = np.exp(offset + slope * np.log(rows[score].to_numpy(dtype=float)))
    return said


def section_together(frame: pd.DataFrame) -> str:
    """By editor and number of edits: damage by scope, and its ratio to what single edits foretell."""
    body = []
    for (editor, kind, edits), rows in together(frame).groupby(["editor", "kind", "edits"], sort=False):
        line = [str(editor), f"{kind} {edits:.0f}", str(len(rows))]
        for scope, outcome in OUTCOMES.items():
            measured = rows[f"{OUT}{outcome}"].to_numpy(dtype=float)
            said = foretold(frame, str(editor), scope, rows)
            line += [_spread(measured), "–" if said is None else _spread(measured / said)]
        gain = rows[f"{OUT}far/nll_gain_nats"].to_numpy(dtype=float)
        body.append([*line, _spread(np.exp(gain))])
    if not body:
        return "None yet.\n"
    head = ["editor", "edits", "n"]
    for scope in OUTCOMES:
        head += [f"{scope}, nats", "times what single edits foretell"]
    return table((*head, "perplexity ratio, far"), body) + "\n" + _orders(frame)


def _spread(values: Sequence[float] | np.ndarray) -> str:
    """Median, and the smallest and largest of several."""
    found = np.asarray(values)
    middle = f"{np.median(found):.2g}"
    return middle if len(found) == 1 else f"{middle} ({found.min():.2g} to {found.max():.2g})"


def _orders(frame: pd.DataFrame, fewest: int = 10) -> str:
    """Within one editor and number of edits, how well each scope's score orders the damage."""
    said = []
    for (editor, kind, edits), rows in together(frame).groupby(["editor", "kind", "edits"], sort=False):
        if len(rows) < fewest:
            continue
        figures = (
            f"{scope} {spearman(*(rows[c].to_numpy(dtype=float) for c in (PRED + score, OUT + OUTCOMES[scope]))):.2f}"
            for scope, score in FORETELLING.items()
        )
        said.append(f"{editor}, {kind} {edits:.0f} (n {len(rows)}): {', '.join(figures)}")
    scores = ", ".join(f"`{score}` ({scope})" for scope, score in FORETELLING.items())
    return f"Spearman within one size, of {scores}: {'; '.join(said)}.\n" if said else ""
