"""What a reviewer reads about one plan, as one exchange: the question, and what guardedit measured. No MLflow here.

The text is a function of what an approval names (plan, and drift report of a held edit) and of nothing else, so it can
be made again when an answer is collected and compared with what the server showed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from guardedit.audit.mlflow_content import markdown_rows
from guardedit.audit.report import markdown_text
from guardedit.audit.story import broken as broken_limits
from guardedit.audit.story import quoted, tell
from guardedit.audit.tables import limits_table, probes_table
from guardedit.audit.words import number, visible
from guardedit.records import AuditReport, EditRequest, digest_of

QUESTION = "May this edit go ahead?"
APPROVE, REJECT = "Approve", "Reject"
BRIEF = 1000
"""Characters that MLflow's tables give to each side of the Review tab."""
_EXAMPLES = 6
_TOO_LONG = "Too long for this screen. **Open “View full trace” before you decide.**"


@dataclass(frozen=True)
class Terms:
    """What the policy asks of an approval, as the plan's ledger entry has it."""

    hours: float = 72.0
    """How long an approval counts."""
    approvals: int = 1
    signed: bool = False
    """The policy wants signatures, which the Review tab cannot give."""


@dataclass(frozen=True)
class Page:
    """One exchange, in Markdown."""

    trace_id: str
    title: str
    """What lists of questions show, on one line."""
    asked: str
    found: str
    asked_briefly: str
    found_briefly: str
    """For servers whose database keeps no more than `BRIEF` characters of what the Review tab shows."""

    @property
    def inputs(self) -> dict[str, Any]:
        """As MLflow shows a chat."""
        return {"messages": [{"role": "user", "content": self.asked}]}

    @property
    def outputs(self) -> dict[str, Any]:
        """The answer's side of it."""
        return {"choices": [{"message": {"role": "assistant", "content": self.found}}]}


def trace_id(audit: AuditReport) -> str:
    """The name under which MLflow shows this question: drawn from what an answer to it is bound to."""
    drift = digest_of(audit.drift) if audit.drift is not None and is_held(audit) else ""
    return "tr-" + hashlib.sha256(f"{audit.plan_digest} {drift}".encode()).hexdigest()[:32]


def is_held(audit: AuditReport) -> bool:
    """Whether the question is about a staged copy that the monitor could not decide on."""
    return audit.postop is not None and audit.postop.outcome == "held"


def waits(audit: AuditReport) -> bool:
    """Whether somebody's answer is waited for."""
    return audit.outcome in ("needs-approval", "held")


def page_of(audit: AuditReport, terms: Terms) -> Page:
    """The page of a plan, or of a held edit; what was decided or happened since leaves no trace in it."""
    held = is_held(audit)
    blank: dict[str, Any] = {"decision": None, "mlflow_run_id": None, "mlflow_note": None}
    gone = {} if held else {"drift": None, "drift_base": None, "postop": None}
    asked = audit.model_copy(
        update={**blank, **gone, "outcome": "held" if held else audit.plan.judgement.outcome,
                "digest_after": audit.digest_before}
    )  # fmt: skip
    whole = _question(asked), _found(asked, terms)
    return Page(trace_id(audit), tell(asked).title[:200], *whole, *_briefly(asked, terms, whole))


def _briefly(audit: AuditReport, terms: Terms, whole: tuple[str, str]) -> tuple[str, str]:
    """Both sides in `BRIEF` characters; a text that does not fit is not cut but said to be elsewhere."""
    asked, found = whole
    if len(asked) > BRIEF:
        asked = (
            f"{markdown_text(tell(audit).title)[:400]}\n\n{_TOO_LONG}\n\nPlan digest `{audit.plan_digest}`"
        )
    if len(found) > BRIEF:
        lines = [f"- {markdown_text(visible(f.sentence))}" for f in broken_limits(audit)[:3]]
        told = [_state(audit), *lines, "", *(f"- {line}" for line in consequences(audit, terms)[:2])]
        counts = f"- The answer counts for {number(terms.hours)} hours. Plan digest `{audit.plan_digest}`"
        found = "\n".join([*told, counts, "", "Every limit and example: **View full trace**."])
        found = found if len(found) <= BRIEF else f"{_TOO_LONG}\n\nPlan digest `{audit.plan_digest}`"
    return asked, found


def _question(audit: AuditReport) -> str:
    story, plan = tell(audit), audit.plan
    parts = [markdown_text(story.title), _bullets("The edit", story.asked)]
    points = [line for request in plan.requests for line in code_points(request)]
    if points:
        parts.append(_bullets("Letters beyond ASCII, by code point", tuple(points[:20])))
    if story.warnings:
        parts.append(_bullets("Look twice", story.warnings))
    return "\n\n".join(parts)


def _state(audit: AuditReport) -> str:
    reason = (audit.postop or audit.plan.judgement).reason
    lead = {
        "needs-approval": "**The policy wants a person to decide.**",
        "held": "**The monitor could not decide; a person has to.** Nothing is live.",
        "blocked": "**The policy stops this edit.** It is shown for information.",
    }.get(audit.outcome, "**The policy lets this edit go ahead by itself.** It is shown for information.")
    return f"{lead} {markdown_text(visible(reason))}"


def consequences(audit: AuditReport, terms: Terms) -> tuple[str, ...]:
    """What an answer does, in plain words."""
    if not waits(audit):
        return ("Nothing: no answer is asked for.",)
    yes = (
        "the staged copy becomes the live model as soon as somebody runs `guardedit apply` again"
        if audit.outcome == "held"
        else "somebody may run `guardedit apply`: the change is written to a copy, monitored there, and goes live "
        "only if the monitor lets it"
    )
    lines = [
        f"{APPROVE}: {yes}. It can be undone bit for bit.",
        f"{REJECT}: the edit ends here and the live model stays as it is. A new try is a new plan.",
        "Write your reason under Rationale: an answer without one does not count.",
        f"The answer counts for {number(terms.hours)} hours from the moment you give it, and for these digests only.",
    ]
    if terms.approvals > 1:
        lines.append(
            f"{terms.approvals} different people have to approve; the question comes back until they have."
        )
    if terms.signed:
        lines.append(
            "The policy wants signatures. An approval given here is not one: read here, sign with "
            f"`guardedit approve {audit.plan.plan_id} --key NAME`."
        )
    return tuple(lines)


def _bound(audit: AuditReport) -> str:
    rows = [("Plan", audit.plan.plan_id), ("Plan digest", audit.plan_digest)]
    if is_held(audit) and audit.drift is not None:
        rows.append(("Monitor's report", digest_of(audit.drift)))
    rows += [("Policy", audit.plan.policy_digest), ("Model it stands on", audit.plan.model_digest)]
    rows += [
        ("Editor", audit.plan.editor),
        ("Author", visible(audit.plan.author)),
        ("Planned", audit.plan.created),
    ]
    lines = [
        f"| {name} | {f'`{text}`' if 'sha256' in text else markdown_text(text)} |" for name, text in rows
    ]
    return "\n".join(["**What an answer is bound to**", "", "| What | Which |", "| --- | --- |", *lines])


def _found(audit: AuditReport, terms: Terms) -> str:
    story = tell(audit)
    parts = [_state(audit), _own("What happens if you decide", consequences(audit, terms))]
    parts.append(_bullets(story.others_title, story.others))
    if audit.postop is not None:
        parts.append(_limits(audit, "Limits on the staged copy", audit.postop.findings))
    parts.append(_limits(audit, "Limits before the write", audit.plan.judgement.findings))
    probes = audit.drift.probes if audit.drift is not None else audit.plan.risk.probes
    table = probes_table(
        "Prompts that would change most" if audit.drift is None else "Prompts that changed most", probes
    )
    if table is not None:
        parts.append(f"**{table.caption}**\n\n" + _head_of(table, (0, 2, 3, 4)))
    risky = sorted(audit.plan.risk.latents, key=lambda x: -x.share)[:_EXAMPLES]
    if risky:
        labels = tuple(
            f"{visible(x.label)} ({100 * x.share:.2g} % of what the write picks up)" for x in risky
        )
        parts.append(_bullets("Concepts that the write picks up most (SAE latents, by label)", labels))
    parts.append(_bound(audit))
    return "\n\n".join(parts)


def _limits(audit: AuditReport, title: str, findings: tuple[Any, ...]) -> str:
    if not findings:
        return f"**{title}**\n\nThe policy has none."
    return f"**{title}**\n\n" + markdown_rows(limits_table(audit, title, findings), columns=(0, 1, 2, 3, 4))


def _head_of(table: Any, columns: tuple[int, ...]) -> str:
    lines = markdown_rows(table, columns).splitlines()
    return "\n".join(lines[: 2 + _EXAMPLES])


def _bullets(title: str, lines: tuple[str, ...]) -> str:
    return _own(title, tuple(markdown_text(line) for line in lines))


def _own(title: str, lines: tuple[str, ...]) -> str:
    """Lines that are Markdown already: ours, with nobody's text in them."""
    return f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines)


def code_points(request: EditRequest) -> tuple[str, ...]:
    """A line for each text of a request with letters beyond ASCII: "“café”: é U+00E9"."""
    texts = (request.subject, request.prompt, request.target_new, request.target_true or "")
    found = []
    for text in dict.fromkeys(texts):
        odd = dict.fromkeys(c for c in text if ord(c) > 127)
        if odd:
            points = ", ".join(f"{visible(c)} U+{ord(c):04X}" for c in odd)
            found.append(f"{quoted(text)}: {points}")
    return tuple(found)
