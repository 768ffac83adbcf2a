"""What the monitor's table says: false alarms on mild edits and shams, and which planted leaks it finds and names.

Two alarms are held against each other. The *shipped limits* are those of the policy, after the write. *Beyond the
bank*: a scope's divergence is above that of every accepted edit in the monitor's reference bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.drifted_latents import counted
from benchmarks.guard_sections import shown
from benchmarks.guard_sections import table as lines_of_table
from benchmarks.monitor_power import did_much
from benchmarks.planted_leaks import RELATION, domain_of
from guardedit.drift.null import NullBank
from guardedit.drift.probes import FAR_DOMAINS
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.guard.association import WORST, auroc, figure, spearman
from guardedit.evaluation.guard.fitting import OUTCOMES
from guardedit.evaluation.guard.frames import OUT, measured
from guardedit.evaluation.guard.strata import KNOWN
from guardedit.records import Scope

SEED = 0
SCOPES = {**{domain: f"far_kl_{domain}" for domain in FAR_DOMAINS}, RELATION: "near_kl"}
"""Where a leak may be found -> the monitor's score."""
CHOSEN_ON = (
    "152", "523", "560", "713", "1141", "1622", "1938", "2098", "2976", "3529", "4031", "5071", "6213", "6726", "6933",
    "7349", "9246", "9774", "10369", "10609", "11145", "11364", "11553", "11710", "11798", "11958", "12154", "12246",
    "13923", "13943", "16497", "17108", "17391", "18108", "18163", "19108", "19156", "19616", "20193", "20242", "20629",
    "20706", "20879", "21578", "21612",
)  # fmt: skip
"""Edits that did little and had been monitored when limits were changed last: their alarms say nothing of these."""
LOOKED_AT = (
    "3529", "4442", "5904", "6213", "7267", "7953", "8213", "8872", "10090", "11730", "12366", "12410", "12709",
    "14087", "16880", "19505", "20068", "20448", "20879",
)  # fmt: skip
"""Edits in the worst tenth of a scope that had been monitored by then."""
NEW = {"subject-kl"}
"""Rules that did not bind before."""
BEFORE = {
    "the limits before": {"subject_lost_top1": 0.5},
    "the limits at first": {"subject_lost_top1": 0.5, "perplexity_ratio": 1.01, "sae_validity": 1.1},
}
"""Scores whose limits were changed, and what bound; all other limits stand as they did."""
ABOUT = {"far": ("far", "perplexity"), "near": ("near",), "subject": ("subject",)}
"""Beginnings of the rules that are about a scope."""
TELLING: dict[Scope, tuple[str, ...]] = {
    "far": ("far_kl", "far_lost_top1"), "near": ("near_kl", "near_lost_top1", "namesake_kl"),
    "subject": ("subject_kl", "subject_lost_top1"),
}  # fmt: skip
"""The monitor's scores that are about a scope."""
EDITOR = "rome"
UNNAMED = ("subject", "target", "paraphrase")
"""Rules about the edit's own subject, which say nothing of a leak, begin with these."""


def section_monitor(table: pd.DataFrame, bank: NullBank, rows: pd.DataFrame) -> str:
    """False alarms, real harm by scope, then detection of leaks by scope and size."""
    real = (caught(table, rows), told_apart(table, rows))
    return "\n".join((alarms(table, bank), mild(table, rows), *real, detections(table, bank)))


def mild(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Of all edits that did little: whether what they break is about their own subject, and how many are among the
    worst tenth of a scope all the same."""
    some = table[(table["kind"] == "mild") & (table["scope"] == "")]
    known = measured(rows, EDITOR, (KNOWN,))
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
    known = measured(rows, EDITOR, (KNOWN,)).set_index("case_id")
    harmful = table[table["kind"] == "harmful"]
    if harmful.empty:
        return "No edit that did harm has been monitored yet.\n"
    lines = [
        "| in the worst tenth of | n | break a limit | by the limits before | one of that scope | damage, nats | "
        "the monitor's score of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for scope, outcome in OUTCOMES.items():
        damage = known[f"{OUT}{outcome}"].dropna()
        worst = damage[damage > damage.quantile(WORST)]
        some = harmful[harmful["case_id"].isin(worst.index)]
        own = sum(any(rule.startswith(ABOUT[scope]) for rule in broken.split()) for broken in some["broken"])
        spans = (_span(worst[some["case_id"]]), _span(some[f"score.{scope}_kl"]))
        before = sum(_broke(row, BEFORE["the limits before"]) for _, row in some.iterrows())
        counts = (f"{n} of {len(some)}" for n in (int((some["broken"] != "").sum()), before, own))
        lines.append(f"| {scope} | {len(some)} | {' | '.join((*counts, *spans))} |")
    return "\n".join(lines) + "\n"


def told_apart(monitored: pd.DataFrame, rows: pd.DataFrame) -> str:
    """How well each of the monitor's scores orders the damage where it does not look, and tells a scope's worst tenth
    from all other real edits that were monitored, without any limit."""
    edits, known = counted(monitored, rows), measured(rows, EDITOR, (KNOWN,))
    body = []
    for scope, outcome in OUTCOMES.items():
        damage = edits[f"{OUT}{outcome}"].to_numpy(dtype=float)
        worst = (damage > known[f"{OUT}{outcome}"].quantile(WORST)).astype(float)
        for name in TELLING[scope]:
            # A table of before namesakes has none of theirs.
            score = edits.get(f"score.{name}", pd.Series(np.nan, edits.index)).to_numpy(dtype=float)
            there = np.isfinite(score)
            counts = (str(int(there.sum())), str(int(worst[there].sum())))
            found = (figure(one, score, side, edits["relation"].to_numpy(), SEED) for one, side in (
                (auroc, worst), (spearman, damage),
            ))  # fmt: skip
            body.append([scope, f"`{name}`", *counts, *map(shown, found)])
    head = ("damage", "the monitor's score", "n", "in the worst tenth", "AUROC", "Spearman with the damage")
    return lines_of_table(head, body)


def _span(values: pd.Series[float]) -> str:
    return f"{values.min():.2g} to {values.max():.2g}"


def alarms(table: pd.DataFrame, bank: NullBank) -> str:
    """Share of edits without a leak at which an alarm goes off; what could not be measured is no alarm."""
    plain = table[table["scope"] == ""]
    real, worst = plain[plain["kind"] == "mild"], plain[plain["kind"] == "harmful"]
    seen, looked = real["case_id"].isin(CHOSEN_ON), worst["case_id"].isin(LOOKED_AT)
    parts = (
        ("real edits that did little elsewhere", real[~seen]),
        ("the same, those that limits were chosen on", real[seen]),
        ("shams", plain[plain["kind"] == "sham"]),
        ("real edits in the worst tenth of some scope", worst[~looked]),
        ("the same, looked at before limits were chosen", worst[looked]),
    )
    head = (
        "edits",
        "n",
        "shipped limits",
        *BEFORE,
        "beyond the bank",
        "limits broken",
        "namesakes, median nats",
    )
    return lines_of_table(head, [[name, *_alarms_of(calm, bank)] for name, calm in parts if len(calm)])


def _alarms_of(calm: pd.DataFrame, bank: NullBank) -> list[str]:
    """How many, the shares at which alarms go off, which limits are broken, and how far namesakes move."""
    each = [row for _, row in calm.iterrows()]
    shares = [[float(bool(row["broken"])) for row in each]]
    shares += [[float(_broke(row, limits)) for row in each] for limits in BEFORE.values()]
    shares.append([float(bool(_beyond(row, bank))) for row in each])
    broken = sorted({rule for rules in calm["broken"] for rule in rules.split()})
    told = ", ".join(f"`{rule}`" for rule in broken) or "–"
    return [str(len(calm)), *map(_share, shares), told, _namesakes(calm)]


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


def _broke(row: pd.Series, limits: Mapping[str, float]) -> bool:
    """Whether the edit breaks earlier limits: those that were stricter, or one that still stands."""
    stricter = any(row[f"score.{name}"] > limit for name, limit in limits.items())
    return stricter or bool(set(row["broken"].split()) - NEW)


def _beyond(row: pd.Series, bank: NullBank) -> set[str]:
    return {scope for scope, name in SCOPES.items() if row[f"score.{name}"] > max(bank.values(name))}


def _first(row: pd.Series, bank: NullBank) -> str:
    """The scope whose divergence is largest beside the bank's median."""
    return max(SCOPES, key=lambda s: row[f"score.{SCOPES[s]}"] / float(np.median(bank.values(SCOPES[s]))))


def _share(values: Sequence[float]) -> str:
    found = estimate(values, SEED)
    return "–" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
