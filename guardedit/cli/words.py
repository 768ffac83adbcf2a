"""Plans and edits as JSON documents and as text for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from guardedit.audit.acting import sentences
from guardedit.audit.words import visible
from guardedit.records import (
    AuditReport,
    EditRequest,
    Finding,
    Judgement,
    Plan,
    ProbeChange,
    RiskReport,
    Score,
)

if TYPE_CHECKING:
    from guardedit.pipeline.reporting import Published

_MARKS = {"pass": "ok  ", "fail": "FAIL", "inconclusive": "?   "}


def clean(text: str) -> str:
    """Text from a request, with every character that hides, reorders or breaks a line shown as its code point."""
    return (
        visible(text).replace("⟨", "<").replace("⟩", ">")
        if not text.isascii() or not text.isprintable()
        else text
    )


def scores_document(scores: tuple[Score, ...], judgement: Judgement | None) -> dict[str, Any]:
    """Score name -> value, limit, finding, and what else is known of it."""
    findings = (
        {finding.metric.split("/", 1)[1]: finding for finding in judgement.findings} if judgement else {}
    )
    return {score.name: _score(score, findings.get(score.name)) for score in scores}


def _score(score: Score, finding: Finding | None) -> dict[str, Any]:
    known = score.model_dump(exclude_none=True, exclude={"name"})
    return {
        **known,
        "value": score.value,
        "limit": finding.limit if finding else None,
        "op": finding.op if finding else None,
        "level": finding.level if finding else None,
        "finding": finding.verdict if finding else None,
        "waived_by": finding.waiver.author if finding and finding.waiver else None,
    }


def plan_document(plan: Plan) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "plan_id": plan.plan_id,
        "edit_id": plan.plan_id,
        "plan_digest": plan.digest,
        "outcome": plan.judgement.outcome,
        "reason": plan.judgement.reason,
        "editor": plan.editor,
        "requests": [request.model_dump(mode="json", exclude_none=True) for request in plan.requests],
        "digest_before": plan.model_digest,
        "scores": scores_document(plan.risk.scores, plan.judgement),
        "delta": plan.delta.model_dump(mode="json"),
        "seconds": plan.risk.seconds,
        **(_joint_document(plan) if plan.is_joint else {}),
        **({"alternative": [_dumped(one) for one in plan.alternative]} if plan.alternative else {}),
    }


def _dumped(request: EditRequest) -> dict[str, Any]:
    return request.model_dump(mode="json", exclude_none=True)


def signature(word: dict[str, Any]) -> str:
    """Whose hand a decision is in, and what a reader has to know about it."""
    if word["outcome"] == "auto-approved":
        return "the policy's own word"
    parts = [
        f"signed with key {word['key'][:12]}" if word.get("key") else "unsigned: a name that nobody checked"
    ]
    parts += ["own plan"] if word.get("own") else []
    parts += [f"BREAK-GLASS, ticket {clean(word['ticket'])}"] if word.get("ticket") else []
    return "; ".join(parts)


def decisions_text(words: list[dict[str, Any]]) -> str:
    """Every word on a plan, one line each."""
    return "".join(
        f"\n  {word['outcome']} by {clean(word['approver'])} ({signature(word)}): {clean(word['reason'])}"
        for word in words
        if word["outcome"] != "auto-approved"
    )


def _joint_document(plan: Plan) -> dict[str, Any]:
    """What only a plan of many requests has: those that are left out, and how each was screened."""
    reasons = [row.reason for row in plan.screened if row.stopped]
    return {
        "stopped": [
            {**request.model_dump(mode="json", exclude_none=True), "stopped_because": reason}
            for request, reason in zip(plan.stopped, reasons, strict=True)
        ],
        "screened": [row.model_dump(mode="json", exclude_none=True) for row in plan.screened],
    }


def edit_document(published: Published) -> dict[str, Any]:
    """An edit after it was applied, refused or undone, for programs."""
    audit = published.audit
    drift = audit.drift
    return {
        **plan_document(audit.plan),
        "outcome": audit.outcome,
        "target_probabilities": audit.target_probabilities or _rehearsed(audit.plan.risk),
        **({"outcomes": [row.model_dump(mode="json") for row in audit.outcomes]} if audit.outcomes else {}),
        "digest_before": audit.digest_before,
        "digest_staged": audit.digest_staged,
        "digest_after": audit.digest_after,
        "postop": audit.postop.model_dump(mode="json") if audit.postop else None,
        "drift_scores": scores_document(drift.scores, audit.postop) if drift else {},
        "drift_latents": _latent_counts(published),
        "report": str(published.files.html),
        "mlflow_run_id": published.mlflow_run_id,
        "mlflow_note": published.mlflow_problem,
    }


def _rehearsed(risk: RiskReport) -> dict[str, float]:
    """P(old) and P(new) of a plan that was never staged: as the model is, and as the rehearsal had it."""
    nats = {"old_before": risk.score("conflict_old_nats"), "new_before": risk.score("conflict_new_nats")}
    probabilities = {
        "old_rehearsed": risk.score("rehearsed_p_old"),
        "new_rehearsed": risk.score("rehearsed_p_new"),
    }
    found = {
        name: math.exp(-score.value) for name, score in nats.items() if score and score.value is not None
    }
    return found | {
        name: score.value for name, score in probabilities.items() if score and score.value is not None
    }


def _latent_counts(published: Published) -> dict[str, int]:
    drift = published.audit.drift
    counts = {"intended": 0, "spill": 0, "collateral": 0}
    for latent in drift.latents if drift else ():
        if latent.significant:
            counts[latent.kind] += 1
    return counts


def plan_text(plan: Plan) -> str:
    """A plan for people: what, verdict, findings, who else would notice."""
    lines = [
        f"plan {plan.plan_id}   {plan.digest[:19]}…",
        *request_lines(plan),
        f"  solved by {plan.editor}" if plan.delta.changes else "  nothing was solved",
        *(f"  {clean(line)}" for line in sentences(plan)),
        f"  {plan.judgement.outcome.upper()}: {clean(plan.judgement.reason)}",
        *findings_lines(plan.judgement),
        *_alternative_lines(plan),
        *disturbed_lines(plan.risk),
    ]
    return "\n".join(lines)


def _alternative_lines(plan: Plan) -> list[str]:
    """Where the other form lies, ready to be planned."""
    if not plan.alternative:
        return []
    named = sorted({clean(str(one.context)) for one in plan.alternative})
    return [
        f"  prepared: the same as a fact that holds in a context ({', '.join(named)}), beside the plan:",
        f"  guardedit plan HOME/plans/{plan.plan_id}/in_context.jsonl --editor contextual",
    ]


def request_lines(plan: Plan, n: int = 10) -> list[str]:
    """What is to change, and of many requests which are left out."""
    lines = [
        f"  {clean(request.asked)}: {clean(request.target_true or '?')} -> {clean(request.target_new)}"
        for request in plan.requests[:n]
    ]
    lines += [f"  … and {len(plan.requests) - n} more requests"] if len(plan.requests) > n else []
    out = [row for row in plan.screened if row.stopped]
    lines += [
        f"  STOPPED {clean(row.prompt)} -> {clean(row.target_new)}: {clean(row.reason)}" for row in out[:n]
    ]
    return lines + ([f"  … and {len(out) - n} more stopped"] if len(out) > n else [])


def findings_lines(judgement: Judgement, closest: int | None = None) -> list[str]:
    """One line a finding: what is not kept first, then by how close to the limit; with `closest`, only so many kept."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    ranked = sorted(judgement.findings, key=lambda f: (order[f.verdict], -_closeness(f)))
    open_ = [f for f in ranked if f.verdict != "pass"]
    kept = [f for f in ranked if f.verdict == "pass"][:closest]
    return [
        f"  {_MARKS[f.verdict]} {f.level:8} {clean(f.sentence)}{' (waived)' if f.waiver else ''}"
        for f in open_ + kept
    ]


def _closeness(finding: Finding) -> float:
    """How much of its limit a value uses up: 1 at the limit, whichever side it is on; 0 where that means nothing."""
    value, limit = finding.value, finding.limit
    if value is None or value <= 0 or limit <= 0:
        return 0.0
    return value / limit if finding.op in ("<", "<=") else limit / value


def disturbed_lines(risk: RiskReport, n: int = 3) -> list[str]:
    """What would move most: concepts, tokens in context, and answers about the same subject."""
    lines = []
    if risk.latents:
        top = ", ".join(f"{clean(leak.label)} ({leak.share:.0%})" for leak in risk.latents[:n])
        lines.append(f"  concepts that the write picks up most: {top}")
    for move in risk.tokens[:n]:
        context = clean(" ".join(move.context.split()))
        lines.append(f"  would move: …{context}…  ({move.domain}, {move.move:.2f} of its size)")
    changed = sorted((p for p in risk.probes if p.before != p.after), key=lambda p: -p.kl_nats)
    moved = [p for p in changed if p.scope not in ("target", "namesake")]
    lines += [f"  would answer differently: {_changed_answer(probe)}" for probe in moved[:n]]
    return [*lines, *_namesake_line(risk, [p for p in changed if p.scope == "namesake"])]


def _namesake_line(risk: RiskReport, changed: list[ProbeChange]) -> list[str]:
    """Made-up bearers of the name in one line: an ordinary edit moves most of them."""
    lost = risk.score("rehearsed_namesake_lost_top1")
    if lost is None or not lost.value or not changed:
        return []
    how_many = f"{round(lost.value * (lost.n or 0))} of {lost.n}"
    return [
        f"  would answer differently about others of the name: {how_many}, as {_changed_answer(changed[0])}"
    ]


def _changed_answer(probe: ProbeChange) -> str:
    return f"{clean(probe.prompt)} {clean(probe.before)!r} -> {clean(probe.after)!r}"


def _targets(audit: AuditReport) -> str:
    """P(new) and P(old) before and after; of many requests the means, the worst, and how many hold."""
    p, requests = audit.target_probabilities, audit.plan.requests
    many = len(requests) > 1
    new = f"new answers, mean of {len(requests)}" if many else clean(requests[0].target_new)
    old = "old answers" if many else clean(requests[0].target_true or "?")
    text = f"P({new}) {p['new_before']:.4f} -> {p['new_after']:.4f}"
    if "old_after" in p:
        text += f", P({old}) {p['old_before']:.4f} -> {p['old_after']:.4f}"
    if not many:
        return text
    held = sum(row.holds for row in audit.outcomes)
    return f"{text}; lowest P(new) {p['new_after_worst']:.4f}; {held} of {len(requests)} hold"


def edit_text(published: Published) -> str:
    """An edit after it was applied, refused or undone, for people."""
    audit = published.audit
    p = audit.target_probabilities
    lines = [f"edit {audit.edit_id}: {audit.outcome.upper()}"]
    if "new_after" in p:
        lines.append(f"  {_targets(audit)}")
    if audit.postop:
        lines += [f"  {clean(audit.postop.reason)}", *findings_lines(audit.postop)]
    lines.append(f"  live model: {audit.digest_after}")
    lines.append(f"  report: {published.files.html}")
    lines.append(f"  MLflow: {published.mlflow_run_id or published.mlflow_problem}")
    return "\n".join(lines)
