"""What MLflow is told about one edit: pure functions of the audit record. MLflow itself is not needed here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from guardedit.audit import acting
from guardedit.audit.many import request_rows
from guardedit.audit.report import markdown_cell, markdown_text
from guardedit.audit.sheet import Table
from guardedit.audit.story import allowed, observed, tell
from guardedit.audit.tables import limits_table, verdict_of
from guardedit.audit.words import hand, visible
from guardedit.records import AuditReport, DriftReport, Outcome, Plan, Score, digest_of

Stage = Literal["plan", "preop", "edit", "postop"]
Row = dict[str, Any]
Tables = dict[str, list[Row]]

STAGES: tuple[Stage, ...] = ("preop", "edit", "postop")
_WAITING: frozenset[Outcome] = frozenset({"auto-approved", "needs-approval", "held"})
_KEY = re.compile(r"[^\w./ :-]")


@dataclass(frozen=True)
class Dataset:
    """Something the measurements were computed from."""

    name: str
    digest: str
    context: str


def milliseconds(stamp: str) -> int:
    """An ISO 8601 time as MLflow counts it; a time without zone is UTC."""
    at = datetime.fromisoformat(stamp)
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)


def fingerprint(audit: AuditReport) -> str:
    """Digest of the record without MLflow's own fields, which change once MLflow has been told."""
    return digest_of(audit.model_copy(update={"mlflow_run_id": None, "mlflow_note": None}))


def status_of(audit: AuditReport) -> str:
    """FINISHED once nobody has to do anything; SCHEDULED while the plan waits."""
    return "SCHEDULED" if audit.outcome in _WAITING else "FINISHED"


def stages_of(audit: AuditReport) -> tuple[Stage, ...]:
    """The stages that took place; a blocked edit has no post-op."""
    return STAGES if audit.drift is not None else STAGES[:2]


def run_name(audit: AuditReport) -> str:
    """ "✓ Eiffel Tower: Paris → Rome (rome)"."""
    story = tell(audit)
    return f"{story.sign.icon} {story.title} ({visible(audit.plan.editor)})"[:250]


def tags(audit: AuditReport) -> dict[str, str]:
    """Search keys; all of it is in the ledger too. Digests are whole, texts have no hidden characters."""
    decision = audit.decision
    found = {
        "plan_id": audit.plan.plan_id,
        "edit_id": audit.edit_id,
        "outcome": audit.outcome,
        "verdict": (audit.postop or audit.plan.judgement).verdict,
        "editor": audit.plan.editor,
        "model": audit.plan.model_name,
        "author": audit.plan.author,
        "approver": decision.approver if decision else "",
        "decided_by": hand(decision) if decision else "",
        "plan_digest": audit.plan_digest,
        "digest_after": audit.digest_after,
        "waivers": str(len(audit.plan.waivers)),
        "waits": "yes" if audit.outcome in _WAITING else "no",
        "incident": "yes" if is_incident(audit) else "no",
    }
    return {f"guardedit.{name}": visible(value)[:5000] for name, value in found.items() if value}


def is_incident(audit: AuditReport) -> bool:
    """Whether the saved view of incidents lists it: stopped, dropped, held, undone, or let through in an emergency."""
    emergency = audit.decision is not None and audit.decision.ticket is not None
    return emergency or audit.outcome in ("blocked", "rolled-back", "held")


def params(audit: AuditReport) -> dict[str, str]:
    """What was chosen: editor, model, seed, hyper-parameters, software. Never changes for one plan."""
    plan = audit.plan
    chosen: dict[str, Any] = {
        "editor": plan.editor,
        "model": plan.model_name,
        "seed": plan.seed,
        "requests": len(plan.requests),
        **({"stopped": len(plan.stopped)} if plan.is_joint else {}),
        "digest.model": plan.model_digest,
        "digest.policy": plan.policy_digest,
        "digest.delta": plan.delta.file_digest,
        **{f"hparams.{k}": v for k, v in plan.delta.hparams.items()},
        **{f"version.{k}": v for k, v in plan.versions.items()},
    }
    return {_key(name): visible(str(value))[:5000] for name, value in chosen.items()}


def metrics(audit: AuditReport) -> dict[Stage, dict[str, float]]:
    """Finite numbers by stage, named `preop/…`, `edit/…`, `postop/…`, `postop-base/…`."""
    found: dict[Stage, dict[str, float]] = {
        "preop": _scores("preop", audit.plan.risk.scores),
        "edit": _edit(audit),
        "postop": {},
    }
    for report in (audit.drift, audit.drift_base):
        if report is not None:
            found["postop"] |= _drift(report)
    found["preop"] |= {"preop/limits_broken": _broken(audit.plan.judgement.findings)}
    if audit.postop is not None:
        found["postop"] |= {"postop/limits_broken": _broken(audit.postop.findings)}
    return {
        stage: {_key(k): v for k, v in numbers.items() if math.isfinite(v)}
        for stage, numbers in found.items()
    }


def _broken(findings: tuple[Any, ...]) -> float:
    return float(sum(f.verdict != "pass" for f in findings))


def _scores(prefix: str, scores: tuple[Score, ...]) -> dict[str, float]:
    return {f"{prefix}/{s.name}": s.value for s in scores if s.value is not None}


def _drift(report: DriftReport) -> dict[str, float]:
    prefix = "postop" if report.reference == "previous" else "postop-base"
    counts = {
        f"{prefix}/latents_{kind}": float(sum(x.significant and x.kind == kind for x in report.latents))
        for kind in ("intended", "spill", "collateral")
        if report.latents
    }
    return {**_scores(prefix, report.scores), **counts, f"{prefix}/seconds": report.seconds}


def _edit(audit: AuditReport) -> dict[str, float]:
    delta = audit.plan.delta
    found = {f"edit/p_{name}": value for name, value in audit.target_probabilities.items()}
    for name, value in delta.diagnostics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"edit/{name}"] = float(value)
    found["edit/tensors"] = float(len(delta.changes))
    if audit.plan.is_joint:
        found |= {
            "edit/requests": float(len(audit.plan.requests)),
            "edit/stopped": float(len(audit.plan.stopped)),
        }
    if audit.outcomes:
        found["edit/requests_held"] = float(sum(row.holds for row in audit.outcomes))
    if delta.changes:
        found["edit/delta_norm_ratio"] = max(c.delta_norm_ratio for c in delta.changes)
    return found


def _key(name: str) -> str:
    return _KEY.sub("_", name)[:250]


def description(audit: AuditReport) -> str:
    """The run page's text: verdict, story and limits, in Markdown."""
    story = tell(audit)
    parts = [
        f"## {story.sign.icon} {story.sign.word}: {markdown_text(story.title)}",
        f"{story.headline} {story.action}",
    ]
    for title, lines in (
        ("Asked", story.asked),
        (story.others_title, story.others),
        ("Decided, and why", story.decided),
    ):
        parts.append(f"**{title}**\n\n" + "\n".join(f"- {markdown_text(line)}" for line in lines))
    parts += [_markdown_limits(audit, "before the write", audit.plan.judgement.findings)]
    if audit.postop is not None:
        parts.append(_markdown_limits(audit, "on the staged copy", audit.postop.findings))
    parts.append(
        "The whole report: **Artifacts**, `report.html`. The ledger is the record; this page is a view of it."
    )
    return "\n\n".join(parts)


def _markdown_limits(audit: AuditReport, where: str, findings: tuple[Any, ...]) -> str:
    if not findings:
        return f"The policy has no limits {where}."
    table = limits_table(audit, f"Limits {where}", findings)
    return f"**{table.caption}**\n\n" + markdown_rows(table, columns=(0, 1, 2, 3))


def markdown_rows(table: Table, columns: tuple[int, ...]) -> str:
    """Some columns of a table, as Markdown."""
    lines = [
        "| " + " | ".join(markdown_text(table.head[i]) for i in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    lines += ["| " + " | ".join(markdown_cell(row[i]) for i in columns) + " |" for row in table.rows]
    return "\n".join(lines)


def stage_description(audit: AuditReport, stage: Stage) -> str:
    """A child run's text."""
    said = {
        "preop": f"What the edit would do, measured before the write. {audit.plan.judgement.reason}",
        "edit": f"The solved change, by {audit.plan.editor}: {_changed(audit.plan)}",
        "postop": f"What changed in the staged copy. {audit.postop.reason if audit.postop else 'Not judged.'}",
    }
    return markdown_text(visible(said[stage]))


def _changed(plan: Plan) -> str:
    """How many tensors, or what acts on activations and when."""
    n_tensors = sum(change.acts is None for change in plan.delta.changes)
    return " ".join((f"{n_tensors} tensor(s).", *acting.sentences(plan)))


def tables(audit: AuditReport) -> Tables:
    """Rows by artifact path; empty tables are left out."""
    found = {
        "tables/requests.json": request_rows(audit),
        "tables/limits.json": _limit_rows(audit),
        "tables/scores.json": _score_rows(audit),
        "tables/concepts_at_risk.json": [x.model_dump(mode="json") for x in audit.plan.risk.latents],
        "tables/tokens_that_move.json": [x.model_dump(mode="json") for x in audit.plan.risk.tokens],
        "tables/prompts_rehearsed.json": [x.model_dump(mode="json") for x in audit.plan.risk.probes],
        "tables/tensors.json": [
            x.model_dump(mode="json", exclude={"acts"}) for x in audit.plan.delta.changes
        ],
        "tables/activation_edits.json": acting.edit_rows(audit),
        "tables/gate_latents.json": acting.latent_rows(audit),
    }
    for report in (audit.drift, audit.drift_base):
        if report is not None:
            found |= _drift_tables(report)
    return {path: [_shown(row) for row in rows] for path, rows in found.items() if rows}


def _drift_tables(report: DriftReport) -> dict[str, list[Row]]:
    end = "" if report.reference == "previous" else "_since_base"
    return {
        f"tables/latents_drifted{end}.json": [
            x.model_dump(mode="json")
            for x in sorted(report.latents, key=lambda x: (x.p_value, x.hook_name, x.latent))
        ][:2000],
        f"tables/domains{end}.json": [x.model_dump(mode="json") for x in report.domains],
        f"tables/prompts_after{end}.json": [x.model_dump(mode="json") for x in report.probes],
    }


def _limit_rows(audit: AuditReport) -> list[Row]:
    findings = (*audit.plan.judgement.findings, *(audit.postop.findings if audit.postop else ()))
    return [
        {
            "verdict": markdown_cell(verdict_of(f)),
            "limit": f.sentence,
            "observed": observed(audit, f),
            "allowed": allowed(audit, f),
            "level": f.level,
            "metric": f.metric,
            "waived_by": f.waiver.author if f.waiver else None,
        }
        for f in findings
    ]


def _score_rows(audit: AuditReport) -> list[Row]:
    rows = [("preop", s) for s in audit.plan.risk.scores]
    for report in (audit.drift, audit.drift_base):
        if report is not None:
            rows += [
                ("postop" if report.reference == "previous" else "postop-base", s) for s in report.scores
            ]
    return [{"when": when, **s.model_dump(mode="json")} for when, s in rows]


def _shown(row: Row) -> Row:
    """A row of plain cells: lists joined, no hidden characters."""
    joined = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
    return {k: visible(v) if isinstance(v, str) else v for k, v in joined.items()}


def datasets(audit: AuditReport) -> tuple[Dataset, ...]:
    """Everything that was measured with, by stage."""
    moments = {f"second moment {hook}": d for hook, d in audit.plan.delta.statistics_digests.items()}
    before = moments | audit.plan.risk.inputs
    after = audit.drift.inputs if audit.drift else {}
    pairs = [(before, "preop"), (after, "postop")]
    return tuple(
        Dataset(visible(n)[:500], d, context) for inputs, context in pairs for n, d in sorted(inputs.items())
    )
