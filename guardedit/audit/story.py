"""The report's first paragraph: what was asked, what would happen to the rest, what was decided and why."""

from __future__ import annotations

from guardedit.audit.acting import sentences
from guardedit.audit.sheet import Story
from guardedit.audit.words import OUTCOMES, Sign, hand, mixed_scripts, number, percent, quantity, visible
from guardedit.records import AuditReport, DriftReport, EditRequest, Finding, ProbeChange, Scope, Score

OPS = {"<=": "at most", ">=": "at least", "<": "below", ">": "above", "==": "exactly"}
_OUTSIDE: tuple[tuple[Scope, str], ...] = (
    ("near", "other subjects of the same kind"),
    ("subject", "other facts about the same subject"),
)


def quoted(text: str) -> str:
    """Text of a request between quotation marks, with nothing hidden and no blanks around it."""
    return f"“{visible(text.strip(' '))}”"


def tell(audit: AuditReport) -> Story:
    """The story of one edit."""
    return Story(
        title=title_of(audit),
        sign=sign_of(audit),
        headline=_headline(audit),
        asked=_asked(audit),
        others_title="What happened to the rest" if audit.drift else "What would happen to the rest",
        others=_others(audit),
        decided=_decided(audit),
        action=_action(audit),
        warnings=_warnings(audit),
    )


def title_of(audit: AuditReport) -> str:
    """ "Eiffel Tower: Paris → Rome"; the number of facts when there are many."""
    requests, stopped = audit.plan.requests, audit.plan.stopped
    if not audit.plan.delta.changes and stopped:
        return f"{len(requests) + len(stopped)} facts, {len(stopped)} stopped by the policy"
    if len(requests) != 1:
        return f"{len(requests)} facts changed together"
    one = requests[0]
    old = f"{visible(one.target_true.strip(' '))} → " if one.target_true else "→ "
    return f"{visible(one.subject)}: {old}{visible(one.target_new.strip(' '))}"


def sign_of(audit: AuditReport) -> Sign:
    """Icon and word; an edit that passed and was then undone says so."""
    if undone_on_request(audit):
        return Sign("↶", "Undone on request", "unsure")
    return OUTCOMES[audit.outcome]


def undone_on_request(audit: AuditReport) -> bool:
    """Rolled back although the monitor had let it pass."""
    return audit.outcome == "rolled-back" and audit.postop is not None and audit.postop.verdict == "pass"


def broken(audit: AuditReport) -> tuple[Finding, ...]:
    """Findings that bind and do not pass: those of the monitor where there are any, else those before the write."""
    after = _binding(audit.postop.findings) if audit.postop else ()
    return after or _binding(audit.plan.judgement.findings)


def _binding(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    bad = [f for f in findings if f.verdict != "pass" and f.level != "advisory" and f.waiver is None]
    return tuple(sorted(bad, key=lambda f: (f.verdict != "fail", f.level != "hard")))


def unit_of(audit: AuditReport, finding: Finding) -> str:
    """The unit of the score behind a finding, or "" where no score is found."""
    name = finding.metric.split("/", 1)[-1].removeprefix("lineage_")
    reports: list[tuple[Score, ...]] = [audit.plan.risk.scores]
    if finding.stage == "postop":
        reports = [r.scores for r in (audit.drift, audit.drift_base) if r] + reports
    return next((s.unit for scores in reports for s in scores if s.name == name), "")


def observed(audit: AuditReport, finding: Finding) -> str:
    """The finding's value with its unit."""
    return quantity(finding.value, unit_of(audit, finding))


def allowed(audit: AuditReport, finding: Finding) -> str:
    """The finding's limit in words: "at most 3 %"."""
    return f"{OPS[finding.op]} {quantity(finding.limit, unit_of(audit, finding))}"


def unexpected(probe: ProbeChange) -> bool:
    """The answer changed at a prompt where it should not."""
    return probe.before != probe.after and probe.scope not in ("target", "entailed")


def _headline(audit: AuditReport) -> str:
    if undone_on_request(audit):
        return "The edit had passed and was undone on request; the stored original bytes are back."
    return {
        "committed": "The edit is live. It kept the limits before it was written and again on a monitored copy.",
        "auto-approved": "The plan keeps every limit and may be applied. Nothing has been written yet.",
        "needs-approval": "A person has to decide. Nothing is written before that.",
        "held": "The monitor could not tell whether the edit did harm. Nothing goes live until a person decides.",
        "blocked": "The policy stopped this edit before anything was written. The model is unchanged.",
        "rolled-back": _dropped(audit),
        "rejected": "A person turned the edit down. Nothing was written.",
        "stale": "The model, its statistics or the policy moved on after the plan was made. Nothing was written.",
        "expired": "The approval was not used in time. Nothing was written.",
        "superseded": "Another plan for the same edit took this one's place. Nothing was written by this one.",
    }[audit.outcome]


def _dropped(audit: AuditReport) -> str:
    if audit.postop is None:
        return "The staged copy was thrown away before it could be judged. The edit never went live."
    if audit.postop.verdict == "inconclusive":
        return "The monitor could not tell whether the edit did harm, so the staged copy was thrown away."
    return "The edit did harm on a staged copy, which was thrown away. It never went live."


def _asked(audit: AuditReport) -> tuple[str, ...]:
    plan = audit.plan
    lines = [_one_request(r) for r in plan.requests[:3]]
    if len(plan.requests) > 3:
        lines.append(f"And {len(plan.requests) - 3} more; all are listed below.")
    if plan.stopped:
        lines.append(f"{len(plan.stopped)} more were asked for and left out, because the policy stops them.")
    reasons = list(dict.fromkeys(visible(r.reason) for r in plan.requests if r.reason))
    return (
        *lines,
        *sentences(plan),
        f"Asked by {visible(plan.author)}." + (f" Reason given: {reasons[0]}." if reasons else ""),
    )


def _one_request(request: EditRequest) -> str:
    instead = f" instead of {quoted(request.target_true)}" if request.target_true else ""
    return f"After {quoted(request.asked + ' …')}, the model shall say {quoted(request.target_new)}{instead}."


def _others(audit: AuditReport) -> tuple[str, ...]:
    lines = [_answers(audit, scope, words) for scope, words in _OUTSIDE]
    if _named(audit):
        lines.append(_answers(audit, "namesake", "made-up subjects that end in the same word"))
    lines.append(_far(audit))
    if audit.drift is None:
        lines.append(_most_moved(audit))
    return tuple(line for line in lines if line)


def _answers(audit: AuditReport, scope: Scope, words: str) -> str:
    """How many answers of a scope changed: measured on the staged copy, else as rehearsed."""
    probes = audit.drift.probes if audit.drift else audit.plan.risk.probes
    score = _lost(audit, scope)
    if score is None or score.value is None:
        return f"Whether questions about {words} keep their answers was not measured."
    verb = "got" if audit.drift else "would get"
    if score.n is None:
        return f"In texts about {words}, the most likely next token changed at {percent(score.value)} of the positions."
    line = f"{round(score.value * score.n)} of {score.n} questions about {words} {verb} another answer"
    examples = [p for p in probes if p.scope == scope and unexpected(p)]
    if not examples or score.value == 0:
        return line + "."
    worst = max(examples, key=lambda p: p.kl_nats)
    became = "became" if audit.drift else "would become"
    return f"{line}, such as {quoted(worst.prompt + ' …')}: {quoted(worst.before)} {became} {quoted(worst.after)}."


def _lost(audit: AuditReport, scope: Scope) -> Score | None:
    if audit.drift:
        return audit.drift.score(f"{scope}_lost_top1") or _pooled(audit.drift, scope)
    return audit.plan.risk.score(f"rehearsed_{scope}_lost_top1")


def _named(audit: AuditReport) -> bool:
    """Whether there are namesakes: a subject of one word has none, which is no gap in the measurement."""
    lost = _lost(audit, "namesake")
    return lost is not None and lost.value is not None


def _pooled(drift: DriftReport, scope: Scope) -> Score | None:
    domains = [d for d in drift.domains if d.scope == scope]
    tokens = sum(d.n_tokens for d in domains)
    if not tokens:
        return None
    value = sum(d.lost_top1 * d.n_tokens for d in domains) / tokens
    return Score(name=f"{scope}_lost_top1", value=value, unit="share", stage="postop", scope=scope)


def _far(audit: AuditReport) -> str:
    if audit.drift is None:
        moved = audit.plan.risk.score("leakage_share")
        if moved is None or moved.value is None:
            return "How far unrelated text would move was not measured."
        where = (
            f", more than {number(moved.percentile, 2)} % of the edits this model was calibrated on"
            if moved.percentile
            else ""
        )
        return (
            f"Unrelated text would be disturbed by {percent(moved.value)} of the energy that the edited layer "
            f"usually writes{where}."
        )
    far = [d for d in audit.drift.domains if d.scope == "far"]
    lost = _pooled(audit.drift, "far")
    if lost is None or lost.value is None:
        return "Unrelated text was not monitored."
    tokens = sum(d.n_tokens for d in far)
    kinds = ", ".join(visible(d.domain) for d in far)
    return (
        f"In {tokens:,} tokens of unrelated text ({kinds}), the most likely next token changed at "
        f"{percent(lost.value)} of the positions."
    )


def _most_moved(audit: AuditReport) -> str:
    if not audit.plan.risk.tokens:
        return ""
    top = max(audit.plan.risk.tokens, key=lambda t: t.move)
    where = f"{quoted(top.token)} in {quoted(top.context)}"
    return f"The token that would move most is {where}: by {percent(top.move)} of its size."


def _decided(audit: AuditReport) -> tuple[str, ...]:
    lines = [_counts(audit), *_limits_broken(audit)]
    waived = [f for f in audit.plan.judgement.findings if f.waiver]
    if waived:
        names = ", ".join(dict.fromkeys(visible(f.waiver.author) for f in waived if f.waiver))
        lines.append(
            f"{len(waived)} broken limit{'s' if len(waived) > 1 else ''} before the write had been waived by {names}."
        )
    if said := audit.decision:
        lines.append(f"{said.outcome.capitalize()} by {hand(said)}: {visible(said.reason).rstrip('.')}.")
    return tuple(lines)


def _counts(audit: AuditReport) -> str:
    parts = [f"{_kept(audit.plan.judgement.findings)} before the write"]
    if audit.postop:
        parts.append(f"{_kept(audit.postop.findings)} on the monitored copy")
    return "Limits kept: " + ", ".join(parts) + "."


def _kept(findings: tuple[Finding, ...]) -> str:
    return f"{sum(f.verdict == 'pass' for f in findings)} of {len(findings)}"


def _limits_broken(audit: AuditReport) -> tuple[str, ...]:
    bad = broken(audit)
    lines = tuple(_limit_broken(audit, f) for f in bad[:4])
    return lines if len(bad) <= 4 else (*lines, f"And {len(bad) - 4} more, listed below.")


def _limit_broken(audit: AuditReport, finding: Finding) -> str:
    sentence = visible(finding.sentence).rstrip(".")
    if finding.verdict == "inconclusive":
        return f"Cannot be judged: {sentence}."
    if any(c.isdigit() for c in sentence):  # the policy's sentence names the numbers itself
        return f"Broken: {sentence}."
    return f"Broken: {sentence} (observed {observed(audit, finding)}, allowed {allowed(audit, finding)})."


def _action(audit: AuditReport) -> str:
    if undone_on_request(audit):
        return "Nothing to do. The edit can be planned again."
    return {
        "committed": "Nothing to do. It can be undone bit for bit at any time.",
        "auto-approved": "Apply the plan, or leave it: plans expire.",
        "needs-approval": "Read the limits below, then approve or reject the plan.",
        "held": "Read what the monitor found, then approve or reject the staged copy.",
        "blocked": "Nothing to undo. Ask for a narrower fact, another layer or another editor, and plan again.",
        "rolled-back": "Nothing to undo. Try another editor or gentler settings, and plan again.",
        "rejected": "Nothing to undo.",
        "stale": "Nothing to undo. Plan it again on today's model.",
        "expired": "Nothing to undo. Plan it again.",
        "superseded": "Nothing to do here. Look at the plan that replaced it.",
    }[audit.outcome]


def _warnings(audit: AuditReport) -> tuple[str, ...]:
    texts = [
        t
        for r in (*audit.plan.requests, *audit.plan.stopped)
        for t in (r.subject, r.target_new, r.target_true or "")
    ]
    found = [remark for t in texts if (remark := mixed_scripts(t))]
    hidden = [t for t in texts if visible(t) != t]
    if hidden:
        found.append(
            "Characters that do not show, or that reorder text, stand in the request; they are printed as ⟨U+…⟩."
        )
    if audit.outcome != "committed" and audit.digest_after != audit.digest_before:
        found.append("The live model is another version than before this edit; see “Versions”.")
    return tuple(dict.fromkeys(found))
