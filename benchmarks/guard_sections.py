"""The tables of docs/evidence.md, one function a section."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from guardedit.evaluation.guard.association import Figure, auroc_worst, figure, spearman
from guardedit.evaluation.guard.features import (
    CLOSED_FORM,
    MEANT,
    REHEARSAL,
    SAE,
    SETS,
    TRIVIAL,
    Feature,
)
from guardedit.evaluation.guard.findings import alone, fitted, gains, stopping
from guardedit.evaluation.guard.fitting import OUTCOMES, natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED, read_rows
from guardedit.evaluation.guard.operating import gate_figures, judgements, stopped_by_rule, with_harm
from guardedit.gate.policy import Policy
from guardedit.gate.rules import load_policy
from guardedit.models.control import DOMAINS
from guardedit.pipeline.expecting import HARM
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import LEVELS, STANDARD, policy_file

SEED = 0
SHOWN = 10
OPERATING = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
"""Limits of the probability of harm that are shown."""
ALSO = {
    "far/lost_top1": "far, answers lost",
    "near/lost_top1": "near, answers lost", "subject/lost_top1": "subject, answers lost",
    "distractor/kl_nats": "neighbours behind the new fact", "object/kl_nats": "old and new object as subject",
    "subject_chat/kl_nats": "subject, asked in a chat", "far/kl_nats/fiction": "far: fiction",
    "far/kl_nats/encyclopedia": "far: encyclopedia", "far/kl_nats/python": "far: Python",
    "far/kl_nats/chat": "far: chat", "far/kl_nats/arithmetic": "far: arithmetic",
}  # fmt: skip
Section = Callable[[pd.DataFrame], str]


def editors_of(frame: pd.DataFrame, fewest: int = 40) -> list[str]:
    """Editors with enough natural edits: ROME, which the shipped model and policy are about, then the one with most."""
    counts = {editor: len(natural_edits(frame, editor)) for editor in sorted(set(frame["editor"]))}
    return sorted((e for e, n in counts.items() if n >= fewest), key=lambda e: (e != "rome", -counts[e]))


def shown(figure: Figure | dict[str, float] | None) -> str:
    """A figure with its interval."""
    if figure is None:
        return "–"
    value, low, high = (
        (figure["value"], figure["low"], figure["high"])
        if isinstance(figure, dict)
        else (figure.value, figure.low, figure.high)
    )
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def print_section(about: str | None, section: Section) -> None:
    """A command line of its own for a section that is made from the guard's rows alone."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    print(section(read_rows(parser.parse_args().rows)))


def section_counts(frame: pd.DataFrame) -> str:
    """What was tried."""
    found = frame.groupby(["editor", "stratum"]).agg(
        edits=("case_id", "size"), refused=("error", lambda c: c.notna().sum())
    )
    rows = [[e, s, str(r.edits), str(r.refused)] for (e, s), r in found.iterrows()]
    return table(("editor", "stratum", "edits", "not solved or not finite"), rows)


def section_damage(frame: pd.DataFrame) -> str:
    """How much damage there is to predict."""
    rows = []
    for editor in editors_of(frame):
        edits = natural_edits(frame, editor)
        # A model's own far text has other domains than the default model's.
        usual = {f"{OUT}far/kl_nats/{domain}" for domain in DOMAINS}
        own = (
            c.removeprefix(OUT)
            for c in edits.columns
            if c.startswith(f"{OUT}far/kl_nats/") and c not in usual
        )
        for outcome in dict.fromkeys([*OUTCOMES.values(), *ALSO, *own]):
            values = edits.get(f"{OUT}{outcome}", pd.Series(dtype=float)).dropna()
            if len(values):
                q = values.quantile([0.5, 0.9, 1.0])
                rows.append([editor, outcome, str(len(values)), *(f"{v:.2g}" for v in q)])
    return table(("editor", "outcome", "n", "median", "worst tenth from", "largest"), rows)


def section_alone(frame: pd.DataFrame) -> str:
    """Each score alone."""
    parts = []
    for editor in editors_of(frame):
        rows = natural_edits(frame, editor)
        for scope, outcome in OUTCOMES.items():
            orders, alarms = (alone(rows, outcome, one, SEED) for one in (spearman, auroc_worst))
            body = [
                [f"`{name}`", shown(rho), shown(alarms.get(name))]
                for name, rho in list(orders.items())[:SHOWN]
            ]
            parts.append(
                f"**{editor}, {scope}** (n {len(rows)})\n\n"
                + table(("score", "Spearman", "AUROC, worst tenth"), body)
            )
    return "\n".join(parts)


def section_sets(frame: pd.DataFrame) -> str:
    """Sets of scores in the model."""
    rows = []
    for editor in editors_of(frame):
        edits = natural_edits(frame, editor)
        for scope in OUTCOMES:
            for name, features in {**SETS, "meant for the scope": MEANT[scope]}.items():
                got = fitted(edits, scope, features, SEED)
                inside = got["inside_relations"]
                rows.append([
                    editor, scope, name, shown(got["spearman"]), shown(got["auroc"]),
                    f"{inside['value']:.2f}" if inside else "–", shown(got["brier_skill"]), shown(got["coverage"]),
                ])  # fmt: skip
    head = (
        "editor",
        "scope",
        "scores",
        "Spearman",
        "AUROC, worst tenth",
        "inside a relation",
        "Brier skill",
        "coverage of 95 %",
    )
    return table(head, rows)


def section_gains(frame: pd.DataFrame) -> str:
    """What SAE scores add."""
    rows = [
        [editor, scope, name, f"{g['value']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})"]
        for editor in editors_of(frame)
        for scope in OUTCOMES
        for name, g in gains(natural_edits(frame, editor), scope, SEED).items()
    ]
    return table(("editor", "scope", "gain", "value"), rows)


def section_stopping(frame: pd.DataFrame) -> str:
    """Damage avoided by stopping the riskiest fifth."""
    rows = []
    for editor in editors_of(frame):
        found = stopping(natural_edits(frame, editor), MEANT, 0.2, SEED)
        rows += [
            [
                editor,
                scope,
                *(f"{found[scope][k]:.2f}" for k in ("avoided", "own_model", "oracle")),
                f"{found['share']:.2f}",
            ]
            for scope in OUTCOMES
        ]
    head = ("editor", "scope", "one combined number", "the scope's own", "oracle of the scope", "chance")
    return table(head, rows)


def without_harm(policy: Policy) -> Policy:
    """The policy as it is where no risk model speaks."""
    rules = tuple(rule for rule in policy.rules if rule.metric != f"preop/{HARM}")
    return policy.model_copy(update={"rules": rules})


def section_policy(frame: pd.DataFrame) -> str:
    """The shipped policy, each of its rules, and the model's probability at three limits, on edits in the table."""
    editor = editors_of(frame)[0]
    rows = with_harm(natural_edits(frame, editor), SEED)
    folder, gates = kit_folder("smollm2-135m"), {}
    standard = load_policy(policy_file(folder, None, ""))
    judged = judgements(rows, without_harm(standard))
    gates["percentiles alone"] = np.array([j.outcome != "auto-approved" for j in judged])
    for level in LEVELS:
        judged = judgements(rows, load_policy(policy_file(folder, Path(level), "")))
        gates[f"level `{level}`: a person is asked"] = np.array(
            [j.outcome != "auto-approved" for j in judged]
        )
        hits = stopped_by_rule(judged)
        gates |= {
            f"rule `{rule}` alone": hit for rule, hit in hits.items() if hit.any() and level == STANDARD
        }
    gates |= {
        f"`harm_probability` above {limit:g} alone": rows[f"{PRED}{HARM}"].to_numpy() > limit
        for limit in OPERATING
    }
    ordered = sorted(gates.items(), key=lambda one: one[0].startswith("rule"))
    figures = {name: gate_figures(rows, hit) for name, hit in ordered}
    body = [[name, *(f"{v:.2f}" for v in found.values())] for name, found in figures.items()]
    return f"{editor}, n {len(rows)}:\n\n" + table(("gate", *next(iter(figures.values()))), body)


def section_controls(frame: pd.DataFrame, controls: pd.DataFrame) -> str:
    """The same model with SAE scores from other SAEs, and how far each score is the trained one's."""
    editor = str(controls["editor"].iloc[0])
    edits = natural_edits(frame, editor).merge(controls, on=["editor", "stratum", "case_id"], how="inner")
    names = sorted({c.rsplit("@", 1)[1] for c in controls.columns if "@" in c})
    kinds = {"no SAE": (), "trained": SAE, **{n: _renamed(n) for n in names}}
    rows = []
    for scope in OUTCOMES:
        for kind, features in kinds.items():
            got = fitted(edits, scope, (*TRIVIAL, *CLOSED_FORM, *REHEARSAL, *features), SEED)
            rows.append([scope, CONTROLS.get(kind, kind), shown(got["spearman"]), shown(got["auroc"])])
    head = ("scope", "SAE scores from", "Spearman", "AUROC, worst tenth")
    return f"{editor}, n {len(edits)}:\n\n{table(head, rows)}\n{_agreement(edits, names)}"


CONTROLS = {"random": "random directions", "second": "another seed", "shuffled": "energies dealt out anew"}
"""What the columns of `benchmarks.guard_controls` stand for."""


def _agreement(edits: pd.DataFrame, names: Sequence[str]) -> str:
    """Rank correlation of each score with the trained SAE's own, over the same edits."""
    relations, rows = edits["relation"].to_numpy(), []
    for one in SAE:
        own = edits[f"{PRED}{one.score}"].to_numpy(float)
        other = (edits[f"{PRED}{one.score}@{name}"].to_numpy(float) for name in names)
        rows.append(
            [f"`{one.score}`", *(shown(figure(spearman, own, found, relations, SEED)) for found in other)]
        )
    head = ("Spearman with the trained SAE's score", *(CONTROLS.get(name, name) for name in names))
    return table(head, rows)


def _renamed(control: str) -> tuple[Feature, ...]:
    return tuple(Feature(f"{f.score}@{control}", f.sign, f.log) for f in SAE)


SECTIONS: dict[str, Section] = {
    "counts": section_counts, "damage": section_damage, "alone": section_alone, "sets": section_sets,
    "gains": section_gains, "stopping": section_stopping, "policy": section_policy,
}  # fmt: skip
