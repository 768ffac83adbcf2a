"""What the monitor's table says: false alarms on mild edits and shams, and which planted leaks it finds and names.

Two alarms are held against each other. The *shipped limits* are those of the policy, after the write. *Beyond the
bank*: a scope's divergence is above that of every accepted edit in the monitor's reference bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.planted_leaks import RELATION
from guardedit.drift.null import NullBank
from guardedit.drift.probes import FAR_DOMAINS
from guardedit.evaluation.bootstrap import estimate

SEED = 0
SCOPES = {**{domain: f"far_kl_{domain}" for domain in FAR_DOMAINS}, RELATION: "near_kl"}
"""Where a leak may be found -> the monitor's score."""
CHOSEN_ON = (
    "1938", "7349", "20879", "11553", "3529", "1141", "1622", "6726", "4031", "13943",
)  # fmt: skip
"""Edits that had been monitored when two limits were changed: their alarms say nothing of the new ones."""
UNNAMED = ("subject", "target", "paraphrase")
"""Rules about the edit's own subject, which say nothing of a leak, begin with these."""


def section_monitor(table: pd.DataFrame, bank: NullBank) -> str:
    """False alarms, then detection by scope and size."""
    return alarms(table, bank) + "\n" + detections(table, bank)


def alarms(table: pd.DataFrame, bank: NullBank) -> str:
    """Share of edits without a leak at which an alarm goes off; what could not be measured is no alarm."""
    rows = ["| edits | n | shipped limits | beyond the bank | limits broken |", "|---|---|---|---|---|"]
    plain = table[table["scope"] == ""]
    seen = plain["case_id"].isin(CHOSEN_ON)
    for name, calm in (
        ("real edits that did little elsewhere", plain[(plain["kind"] == "mild") & ~seen]),
        ("the same, those that limits were chosen on", plain[(plain["kind"] == "mild") & seen]),
        ("shams", plain[plain["kind"] == "sham"]),
        ("real edits in the worst tenth of some scope", plain[plain["kind"] == "harmful"]),
    ):
        if len(calm):
            limits = [float(bool(rules)) for rules in calm["broken"]]
            beyond = [float(bool(_beyond(row, bank))) for _, row in calm.iterrows()]
            broken = sorted({rule for rules in calm["broken"] for rule in rules.split()})
            told = ", ".join(f"`{r}`" for r in broken) or "–"
            rows.append(f"| {name} | {len(calm)} | {_share(limits)} | {_share(beyond)} | {told} |")
    return "\n".join(rows) + "\n"


def detections(table: pd.DataFrame, bank: NullBank) -> str:
    """Share of planted leaks that fire, by what is broken beyond the carrier's own rules, and that are named first."""
    if not (table["scope"] != "").any():
        return "No leak has been planted yet.\n"
    rows = [
        "| planted in | share of top-1 changed | n | its nats, without and with | most that another scope's grow | "
        "shipped limits | beyond the bank | named first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {row["case_id"]: row for _, row in _without_leak(table).iterrows()}
    planted = table[table["scope"] != ""]
    for (scope, share), found in planted.groupby(["scope", "share"], sort=False):
        carriers = [plain[case_id] for case_id in found["case_id"]]
        rows_ = [row for _, row in found.iterrows()]
        fired = [
            bool(_elsewhere(row, set(own["broken"].split())))
            for row, own in zip(rows_, carriers, strict=True)
        ]
        beyond = [scope in _beyond(row, bank) for row in rows_]
        first = [_first(row, bank) == scope for row in rows_]
        moved = _moved(str(scope), rows_, carriers)
        counts = (f"{sum(one)} of {len(found)}" for one in (fired, beyond, first))
        rows.append(f"| {scope} | {share:.2f} | {len(found)} | {moved} | {' | '.join(counts)} |")
    return "\n".join(rows) + "\n"


def _moved(scope: str, leaked: Sequence[pd.Series], carriers: Sequence[pd.Series]) -> str:
    """Mean divergence of the leak's scope without and with it, and the largest growth of another scope's."""
    name = f"score.{SCOPES[scope]}"
    before, after = (float(np.mean([row[name] for row in rows])) for rows in (carriers, leaked))
    others = [f"score.{one}" for where, one in SCOPES.items() if where != scope]
    grown = max(row[o] - own[o] for row, own in zip(leaked, carriers, strict=True) for o in others)
    return f"{before:.4f} → {after:.4f} | {grown:.4f}"


def _without_leak(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["kind"] == "mild") & (table["scope"] == "")]


def _elsewhere(row: pd.Series, own: set[str]) -> set[str]:
    """Broken limits that the carrier alone keeps, its subject's left out."""
    return {rule for rule in row["broken"].split() if rule not in own and not rule.startswith(UNNAMED)}


def _beyond(row: pd.Series, bank: NullBank) -> set[str]:
    return {scope for scope, name in SCOPES.items() if row[f"score.{name}"] > max(bank.values(name))}


def _first(row: pd.Series, bank: NullBank) -> str:
    """The scope whose divergence is largest beside the bank's median."""
    return max(SCOPES, key=lambda s: row[f"score.{SCOPES[s]}"] / float(np.median(bank.values(SCOPES[s]))))


def _share(values: Sequence[float]) -> str:
    found = estimate(values, SEED)
    return "–" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
