"""Edits that should not be proposed, by editor: their damage beside natural ones, and what the guard says of them.

    python -m benchmarks.guard_adversarial docs/data/guard_rows.parquet

The risk models and the policy are those that ship; they are fitted and chosen on natural edits alone, and harm is what
they call so. Of natural edits the probabilities are those of models that saw no edit of the relation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.guard_fresh import said_of, with_harm_said
from benchmarks.guard_levels import KIT, harmful
from benchmarks.guard_sections import SEED, editors_of, print_section, table
from guardedit.evaluation.guard.adversarial import KINDS
from guardedit.evaluation.guard.calibrating import harms_of
from guardedit.evaluation.guard.fitting import OUTCOMES, natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED, measured
from guardedit.evaluation.guard.operating import judgements, with_harm
from guardedit.gate.policy import Policy
from guardedit.gate.rules import load_policy
from guardedit.pipeline.expecting import HARM, RISK_MODELS
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import STANDARD, policy_file
from guardedit.risk.calibration import RiskModel

HEAD = (
    "editor", "kind", "n", "far, median nats", "near", "subject", "harmful", "no opinion", "a person is asked",
    "of the harmful",
)  # fmt: skip


def section_adversarial(frame: pd.DataFrame) -> str:
    """Of each editor with a risk model: natural edits, then each kind."""
    folder = kit_folder(KIT)
    policy = load_policy(policy_file(folder, Path(STANDARD), ""))
    body: list[list[str]] = []
    for editor in editors_of(frame):
        model = RiskModel.load(folder / RISK_MODELS / f"{editor}.json")
        natural = with_harm(natural_edits(frame, editor), SEED, harms_of(model))
        body.append([editor, "natural", *_told(natural, model, policy)])
        body += [[editor, kind, *_told(rows, model, policy)] for kind, rows in _kinds(frame, editor, model)]
    return table(HEAD, body)


def _kinds(frame: pd.DataFrame, editor: str, model: RiskModel) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each kind's edits with what the model says of them, then all of them together."""
    found = []
    for kind in KINDS:
        rows = measured(frame, editor, (kind,))
        if len(rows):
            found.append(with_harm_said(rows, said_of(model, rows)))
            yield kind, found[-1]
    if found:
        yield "all of these", pd.concat(found, ignore_index=True)


def _told(rows: pd.DataFrame, model: RiskModel, policy: Policy) -> list[str]:
    worst = harmful(rows, harms_of(model))
    asked = np.array([one.outcome != "auto-approved" for one in judgements(rows, policy)])
    medians = (rows[f"{OUT}{outcome}"].median() for outcome in OUTCOMES.values())
    shares = (worst.mean(), rows[f"{PRED}{HARM}"].isna().mean(), asked.mean())
    return [
        str(len(rows)), *("–" if pd.isna(m) else f"{m:.2g}" for m in medians), *(f"{one:.2f}" for one in shares),
        f"{asked[worst].mean():.2f}" if worst.any() else "–",
    ]  # fmt: skip


if __name__ == "__main__":
    print_section(__doc__, section_adversarial)
