"""What the shipped levels do to edits by every editor that has a risk model, with one measure of harm for all of them.

    python -m benchmarks.guard_levels docs/data/guard_rows.parquet

Harm is damage in some scope above what the worst tenth of the edits that ROME's shipped model was fitted on did, so
that an editor is not judged by its own habits. Probabilities are of models that saw no edit of the relation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.guard_sections import SEED, print_section, table, without_harm
from guardedit.evaluation.guard.calibrating import harms_of
from guardedit.evaluation.guard.fitting import OUTCOMES, natural_edits
from guardedit.evaluation.guard.frames import OUT
from guardedit.evaluation.guard.operating import gate_figures, judgements, with_harm
from guardedit.gate.policy import Policy
from guardedit.gate.rules import load_policy
from guardedit.pipeline.expecting import RISK_MODELS
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import LEVELS, STANDARD, policy_file
from guardedit.records import Scope
from guardedit.risk.calibration import RiskModel

KIT, FIRST = "smollm2-135m", "rome"
"""The kit, and the editor whose worst tenth is the measure."""
HEAD = (
    "editor", "level", "n", "harmful", "stopped", "harmful ones stopped", "others stopped",
    *(f"{scope} avoided" for scope in OUTCOMES),
)  # fmt: skip


def harmful(rows: pd.DataFrame, harm: dict[Scope, float]) -> np.ndarray:
    """Of each edit, whether its damage in some scope is harm."""
    above = [rows[f"{OUT}{OUTCOMES[scope]}"].to_numpy(dtype=float) > limit for scope, limit in harm.items()]
    found: np.ndarray = np.any(above, axis=0)
    return found


def shares(rows: pd.DataFrame, stopped: np.ndarray, harm: dict[Scope, float]) -> list[str]:
    """Of a gate that stops these edits: how many do harm, shares stopped of all, of those and of the others, and of the
    damage avoided."""
    worst, found = harmful(rows, harm), gate_figures(rows, stopped)
    caught, asked = (f"{stopped[of].mean():.2f}" if of.any() else "–" for of in (worst, ~worst))
    avoided = (f"{found[f'{scope} avoided']:.2f}" for scope in OUTCOMES)
    return [str(len(rows)), str(int(worst.sum())), f"{stopped.mean():.2f}", caught, asked, *avoided]


def section_levels(frame: pd.DataFrame) -> str:
    """A line an editor and level."""
    folder = kit_folder(KIT)
    harm = harms_of(RiskModel.load(folder / RISK_MODELS / f"{FIRST}.json"))
    body = []
    for path in sorted((folder / RISK_MODELS).glob("*.json"), key=lambda one: one.stem != FIRST):
        rows = with_harm(natural_edits(frame, path.stem), SEED, harm)
        for name, policy in _gates(folder):
            stopped = np.array([one.outcome != "auto-approved" for one in judgements(rows, policy)])
            body.append([path.stem, name, *shares(rows, stopped, harm)])
    return table(HEAD, body)


def _gates(folder: Path) -> Iterator[tuple[str, Policy]]:
    """The standard level without the risk model, then every level as it ships."""
    policies = {level: load_policy(policy_file(folder, Path(level), "")) for level in LEVELS}
    yield "percentiles alone", without_harm(policies[STANDARD])
    for level, policy in policies.items():
        yield f"`{level}`", policy


if __name__ == "__main__":
    print_section(__doc__, section_levels)
