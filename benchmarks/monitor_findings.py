"""What the monitor's table says: false alarms on mild edits and shams, and which planted leaks it finds and names.

Two alarms are held against each other. The *shipped limits* are those of the policy, after the write. *Beyond the
bank*: a scope's divergence is above that of every accepted edit in the monitor's reference bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.monitor_power import did_much
from benchmarks.planted_leaks import RELATION, domain_of
from guardedit.drift.null import NullBank
from guardedit.drift.probes import FAR_DOMAINS
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.guard.association import WORST
from guardedit.evaluation.guard.fitting import OUTCOMES
from guardedit.evaluation.guard.frames import OUT, measured

SEED = 0
SCOPES = {**{domain: f"far_kl_{domain}" for domain in FAR_DOMAINS}, RELATION: "near_kl"}
"""Where a leak may be found -> the monitor's score."""
CHOSEN_ON = (
    "1938", "7349", "20879", "11553", "3529", "1141", "1622", "6726", "4031", "13943",
)  # fmt: skip
"""Edits that had been monitored when two limits were changed: their alarms say nothing of the new ones."""
BEFORE = {"perplexity_ratio": 1.01, "sae_validity": 1.1}
"""Scores whose limits were changed, and what bound before; all other limits stand as they did."""
ABOUT = {"far": ("far", "perplexity"), "near": ("near",), "subject": ("subject",)}
"""Beginnings of the rules that are about a scope."""
UNNAMED = ("subject", "target", "paraphrase")
"""Rules about the edit's own subject, which say nothing of a leak, begin with these."""


def section_monitor(table: pd.DataFrame, bank: NullBank, rows: pd.DataFrame) -> str:
    """False alarms, real harm by scope, then detection of leaks by scope and size."""
    return "\n".join((alarms(table, bank), mild(table, rows), caught(table, rows), detections(table, bank)))


def mild(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Of all edits that did little: whether what they break is about their own subject, and how many are among the
    worst tenth of a scope all the same."""
    some = table[(table["kind"] == "mild") & (table["scope"] == "")]
    known = measured(rows, "rome", ("known",))
    worst = some["case_id"].isin(known[did_much(known)]["case_id"])
    elsewhere = [float(bool(_elsewhere(row, set()))) for _, row in some.iterrows()]
    alarm = some["broken"] != ""
    return (
        f"Of all {len(some)} that did little, a limit outside the subject is broken by {_share(elsewhere)}; "
        f"{int(worst.sum())} are in the worst tenth of a scope, of the {int(alarm.sum())} that break a limit "
        f"{int((worst & alarm).sum())}.\n"
    )


def caught(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Of monitored edits in a scope's worst tenth, how many break a limit, and how many one that is about the scope;
    `rows` are the guard's, which hold the damage where the monitor does not look."""
    known = measured(rows, "rome", ("known",)).set_index("case_id")
    harmful = table[table["kind"] == "harmful"]
    if harmful.empty:
        return "No edit that did harm has been monitored yet.\n"
    lines = [
        "| in the worst tenth of | n | break a limit | one of that scope | damage, nats | the monitor's score of it |",
        "|---|---|---|---|---|---|",
    ]
    for scope, outcome in OUTCOMES.items():
        damage = known[f"{OUT}{outcome}"].dropna()
        worst = damage[damage > damage.quantile(WORST)]
        some = harmful[harmful["case_id"].isin(worst.index)]
        own = sum(any(rule.startswith(ABOUT[scope]) for rule in broken.split()) for broken in some["broken"])
        spans = (_span(worst[some["case_id"]]), _span(some[f"score.{scope}_kl"]))
        counts = (f"{n} of {len(some)}" for n in (int((some["broken"] != "").sum()), own))
        lines.append(f"| {scope} | {len(some)} | {' | '.join((*counts, *spans))} |")
    return "\n".join(lines) + "\n"


def _span(values: pd.Series[float]) -> str:
    return f"{values.min():.2g} to {values.max():.2g}"


def alarms(table: pd.DataFrame, bank: NullBank) -> str:
    """Share of edits without a leak at which an alarm goes off; what could not be measured is no alarm."""
    rows = [
        "| edits | n | shipped limits | the limits before | beyond the bank | limits broken | namesakes, median nats |",
        "|---|---|---|---|---|---|---|",
    ]
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
            before = [
                float(now or _broke_before(row))
                for now, (_, row) in zip(limits, calm.iterrows(), strict=True)
            ]
            shares = " | ".join(map(_share, (limits, before, beyond)))
            rows.append(f"| {name} | {len(calm)} | {shares} | {told} | {_namesakes(calm)} |")
    return "\n".join(rows) + "\n"


def _namesakes(rows: pd.DataFrame) -> str:
    """Of the edits that were monitored since namesakes are read."""
    found = rows["score.namesake_kl"].dropna() if "score.namesake_kl" in rows else pd.Series(dtype=float)
    return f"{found.median():.2g} (n {len(found)})" if len(found) else "–"


def detections(table: pd.DataFrame, bank: NullBank) -> str:
    """Share of planted leaks that fire, by what is broken beyond the carrier's own rules, and that are named first.

    A leak that changes no prediction at all (a relation may be too small for one prompt in a hundred) is none.
    """
    if not (table["scope"] != "").any():
        return "No leak has been planted yet.\n"
    rows = [
        "| planted in | share of top-1 changed | n | its nats, without and with | most that another scope's grow | "
        "shipped limits | beyond the bank | named first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {row["case_id"]: row for _, row in _without_leak(table).iterrows()}
    planted = table[(table["scope"] != "") & (table["came_to"] > 0)].sort_values(["scope", "share"])
    for (named, share), found in planted.groupby(["scope", "share"], sort=False):
        scope = domain_of(str(named))
        carriers = [plain[case_id] for case_id in found["case_id"]]
        rows_ = [row for _, row in found.iterrows()]
        fired = [
            bool(_elsewhere(row, set(own["broken"].split())))
            for row, own in zip(rows_, carriers, strict=True)
        ]
        beyond = [scope in _beyond(row, bank) for row in rows_]
        first = [_first(row, bank) == scope for row in rows_]
        moved = _moved(scope, rows_, carriers)
        counts = (f"{sum(one)} of {len(found)}" for one in (fired, beyond, first))
        rows.append(f"| {named} | {share:.2f} | {len(found)} | {moved} | {' | '.join(counts)} |")
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


def _broke_before(row: pd.Series) -> bool:
    return any(row[f"score.{name}"] > limit for name, limit in BEFORE.items())


def _beyond(row: pd.Series, bank: NullBank) -> set[str]:
    return {scope for scope, name in SCOPES.items() if row[f"score.{name}"] > max(bank.values(name))}


def _first(row: pd.Series, bank: NullBank) -> str:
    """The scope whose divergence is largest beside the bank's median."""
    return max(SCOPES, key=lambda s: row[f"score.{SCOPES[s]}"] / float(np.median(bank.values(SCOPES[s]))))


def _share(values: Sequence[float]) -> str:
    found = estimate(values, SEED)
    return "–" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
