"""A risk model of ROME's first edits on the later ones: what it says of them beside what was measured.

    python -m benchmarks.guard_fresh docs/data/guard_rows.parquet

Fitted are the natural ROME edits of docs/data/near_rehearsal.parquet, which the levels of the policies were chosen on;
every later row of guard_rows.parquet is fresh. Recipe and levels were fixed before the later rows were made; how many
sentences about the subject are rehearsed was settled later, on all of them. The model that ships is fitted on all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.guard_sections import SEED, shown, table
from guardedit.evaluation.guard.association import auroc_worst, figure, spearman
from guardedit.evaluation.guard.calibrating import calibrated
from guardedit.evaluation.guard.findings import avoided
from guardedit.evaluation.guard.fitting import OUTCOMES, groups_of, natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED, read_rows
from guardedit.evaluation.guard.operating import gate_figures, judgements
from guardedit.gate.policy import load_policy
from guardedit.pipeline.expecting import HARM
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import LEVELS, policy_file
from guardedit.risk.calibration import Expectation, RiskModel

KIT, EDITOR, LAYERS = "smollm2-135m", "rome", (5,)
STOPPED = 0.2
HEAD = (
    "scope", "n", "no opinion", "Spearman", "AUROC, worst tenth", "inside the interval", "Brier skill", "base rate",
)  # fmt: skip


def fresh_edits(frame: pd.DataFrame, fitted: Sequence[str]) -> pd.DataFrame:
    """Natural edits of the model's editor that it was not fitted on."""
    natural = natural_edits(frame, EDITOR)
    return natural[~natural["case_id"].isin(list(fitted))].reset_index(drop=True)


def first_model(frame: pd.DataFrame, fitted: Sequence[str]) -> RiskModel:
    """What `guardedit calibrate` makes of the edits named."""
    return calibrated(frame[frame["case_id"].isin(list(fitted))], KIT, EDITOR, LAYERS, SEED)[0]


def said_of(model: RiskModel, edits: pd.DataFrame) -> list[tuple[Expectation, ...]]:
    """The model's words about each edit."""
    columns = [name for name in edits.columns if name.startswith(PRED)]
    rows = edits[columns].rename(columns=lambda name: name.removeprefix(PRED)).to_dict("records")
    return [
        model.expect({name: None if pd.isna(value) else value for name, value in row.items()}) for row in rows
    ]


def with_harm_said(edits: pd.DataFrame, said: Sequence[tuple[Expectation, ...]]) -> pd.DataFrame:
    """The edits with the model's probability of harm, None where it has no opinion.

    Without an opinion there is no score, which a limit on it cannot be checked by: a person is asked.
    """
    harm = [None if any(one.p_harm is None for one in each) else _worst(each) for each in said]
    return edits.assign(**{f"{PRED}{HARM}": pd.Series(harm, index=edits.index, dtype=object)})


def section_fresh(frame: pd.DataFrame, fitted: Sequence[str], model: RiskModel | None = None) -> str:
    """A line a scope; what stopping the riskiest fifth by the probability of harm would avoid, and each level."""
    edits = fresh_edits(frame, fitted)
    if len(edits) < 10:
        return "None yet.\n"
    found = model or first_model(frame, fitted)
    said = said_of(found, edits)
    lines = [_line(found, edits, [one[at] for one in said], at) for at in range(len(found.scopes))]
    return f"{table(HEAD, lines)}\n{_stopping(edits, said)}\n\n{_levels(edits, said)}"


def _line(model: RiskModel, edits: pd.DataFrame, said: Sequence[Expectation], at: int) -> list[str]:
    scope = model.scopes[at]
    known = np.array([one.value is not None for one in said])
    damage, groups = edits[f"{OUT}{scope.outcome}"].to_numpy(dtype=float)[known], groups_of(edits)[known]
    expected, low, high, p = (
        np.array([getattr(one, name) for one in said], dtype=float)[known]
        for name in ("value", "low", "high", "p_harm")
    )
    inside, harmful = (
        ((low <= damage) & (damage <= high)).astype(float),
        (damage > scope.harm_nats).astype(float),
    )
    cells = (
        figure(spearman, expected, damage, groups, SEED),
        figure(auroc_worst, expected, damage, groups, SEED),
        figure(lambda a, _: float(a.mean()), inside, inside, groups, SEED),
        figure(_brier_skill, p, harmful, groups, SEED),
    )
    counts = (str(int(known.sum())), str(int((~known).sum())))
    return [scope.scope, *counts, *map(shown, cells), f"{harmful.mean():.2f}"]


def _brier_skill(p: np.ndarray, happened: np.ndarray) -> float:
    """Over a forecast of a tenth for every edit."""
    return float(1 - np.mean((p - happened) ** 2) / np.mean((0.1 - happened) ** 2))


def _stopping(edits: pd.DataFrame, said: Sequence[tuple[Expectation, ...]]) -> str:
    """Stop first what the model has no opinion on, then by the largest probability of harm: what the gate would ask
    a person about."""
    risk = np.array([max(1.0 if one.p_harm is None else one.p_harm for one in each) for each in said])
    at, parts = round(STOPPED * len(edits)), []
    for scope, outcome in OUTCOMES.items():
        damage = edits[f"{OUT}{outcome}"].to_numpy(dtype=float)
        parts.append(f"{scope} {avoided(risk, damage)[at]:.2f} (an oracle {avoided(damage, damage)[at]:.2f})")
    return (
        f"Stopping the {at} of {len(edits)} with the largest `harm_probability` avoids: {', '.join(parts)}."
    )


def _levels(edits: pd.DataFrame, said: Sequence[tuple[Expectation, ...]]) -> str:
    """What each shipped level would have done: who is asked, and what that avoids and catches."""
    rows, gates = with_harm_said(edits, said), []
    for level in LEVELS:
        judged = judgements(rows, load_policy(policy_file(kit_folder(KIT), Path(level), "")))
        found = gate_figures(rows, np.array([one.outcome != "auto-approved" for one in judged]))
        gates.append((f"level `{level}`: a person is asked", found))
    body = [[name, *(f"{value:.2f}" for value in found.values())] for name, found in gates]
    return table(("gate", *gates[0][1]), body)


def _worst(each: Sequence[Expectation]) -> float:
    return max(one.p_harm or 0.0 for one in each)


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--near", type=Path, default=Path("docs/data/near_rehearsal.parquet"))
    args = parser.parse_args()
    print(section_fresh(read_rows(args.rows), pd.read_parquet(args.near)["case_id"].tolist()))


if __name__ == "__main__":
    main()
