"""The report's sections about the edit itself and about what was measured before anything was written."""

from __future__ import annotations

import math

from guardedit.audit import many
from guardedit.audit.sheet import Bar, Bars, Cell, Dumbbells, Picture, Quote, Section, Table
from guardedit.audit.tables import ROWS, left_out, limits_table, probes_table, scores_table
from guardedit.audit.words import excerpt, percent, visible
from guardedit.records import AuditReport, RiskReport


def fact(audit: AuditReport) -> Section:
    """Old and new answer, before and after."""
    picture = _targets(audit)
    absent = () if picture else ("The probabilities of the old and the new answer were not measured.",)
    lead = many.lead(audit, _after(audit)[1]) if len(audit.plan.requests) > 1 and picture else ()
    return Section(
        "fact",
        "The fact, before and after",
        (*lead, *absent),
        (picture,) if picture else (),
        tuple(table for table in _requests(audit) if table.rows),
    )


def _targets(audit: AuditReport) -> Picture | None:
    before = _before(audit)
    after, word = _after(audit)
    names = _answer_names(audit)
    rows = tuple((name, before[k], after.get(k)) for k, name in names.items() if k in before)
    if not rows:
        return None
    table = Table(
        "Probability of each answer to the prompt",
        ("Answer", "Before", word.capitalize()),
        tuple((n, percent(b), "unknown" if a is None else percent(a)) for n, b, a in rows),
        frozenset({1, 2}),
        folded=True,
    )
    told = "; ".join(
        f"{n}: {percent(b)} before, {'unknown' if a is None else percent(a)} {word}" for n, b, a in rows
    )
    return Picture(
        "targets", "Old and new answer, before and after", f"{told}.", Dumbbells(rows, word), table
    )


def _before(audit: AuditReport) -> dict[str, float]:
    """Probabilities of the unedited model; what was not monitored is taken from the conflict scores, −log P."""
    seen = audit.target_probabilities
    found = {}
    for which in ("old", "new"):
        conflict = audit.plan.risk.score(f"conflict_{which}_nats")
        if f"{which}_before" in seen:
            found[which] = seen[f"{which}_before"]
        elif conflict is not None and conflict.value is not None:
            found[which] = math.exp(-conflict.value)
    return found


def _after(audit: AuditReport) -> tuple[dict[str, float], str]:
    """Probabilities after the edit, and whether they were measured on the copy or rehearsed."""
    seen = audit.target_probabilities
    if "new_after" in seen or "old_after" in seen:
        return {k: seen[f"{k}_after"] for k in ("old", "new") if f"{k}_after" in seen}, "on the edited copy"
    rehearsed = {k: audit.plan.risk.score(f"rehearsed_p_{k}") for k in ("old", "new")}
    return {k: s.value for k, s in rehearsed.items() if s and s.value is not None}, "rehearsed"


def _answer_names(audit: AuditReport) -> dict[str, str]:
    if len(audit.plan.requests) != 1:
        return {"old": "old answers", "new": "new answers"}
    one = audit.plan.requests[0]
    old = visible(one.target_true.strip(" ")) if one.target_true else "today's answer"
    return {"old": f"{old} (old)", "new": f"{visible(one.target_new.strip(' '))} (new)"}


def _requests(audit: AuditReport) -> tuple[Table, ...]:
    return (many.asked(audit), many.left_out_table(audit)) if audit.plan.is_joint else (_asked(audit),)


def _asked(audit: AuditReport) -> Table:
    rows = tuple(many.words_of(r) for r in audit.plan.requests)
    return Table("What was asked", many.HEAD, rows)


def disturbance(audit: AuditReport) -> Section:
    """What the edit would disturb: concepts, tokens and rehearsed prompts."""
    risk = audit.plan.risk
    picture = _leaks(risk)
    lead = (
        "Measured before anything was written, from the solved change alone: which concepts it reaches into "
        "although it does not mean them, and which words in ordinary text it would move.",
    )
    missing = (
        [] if picture else ["The concepts at risk were not measured (no sparse autoencoder for this layer)."]
    )
    tables = [
        t
        for t in (
            _tokens(risk),
            probes_table("Rehearsed: prompts with the change switched on for a moment", risk.probes),
        )
        if t
    ]
    if not risk.probes:
        missing.append("Nothing was rehearsed.")
    return Section(
        "disturbance",
        "What the edit would disturb",
        (*lead, *missing),
        (picture,) if picture else (),
        tuple(tables),
        items=tuple(map(visible, risk.notes)),
    )


def _leaks(risk: RiskReport) -> Picture | None:
    ranked = sorted(risk.latents, key=lambda x: (-x.share, x.hook_name, x.latent))
    if not ranked:
        return None
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            f"{x.latent}",
            excerpt(x.label, 60),
            excerpt(x.examples[0], 60) if x.examples else "",
            percent(x.share),
            "unknown" if x.firing_rate is None else percent(x.firing_rate),
        )
        for x in ranked[:ROWS]
    )
    table = Table(
        "Concepts at risk",
        ("Latent", "Active at", "For example", "Share of leak", "Fires on tokens"),
        rows,
        frozenset({0, 3, 4}),
        left_out(len(ranked), ROWS),
        folded=True,
    )
    explained = risk.score("leakage_explained")
    known = (
        f" The autoencoder accounts for {percent(explained.value)} of what leaks; the rest has no name."
        if explained and explained.value is not None
        else ""
    )
    top = ranked[0]
    told = f"The largest share, {percent(top.share)}, falls on latent {top.latent} ({excerpt(top.label, 60)}).{known}"
    bars = tuple((f"{excerpt(x.label, 44)}  ·  {x.latent}", x.share) for x in ranked[:10])
    return Picture(
        "leaks", "Concepts that the write reaches into", told, Bars(bars, "share of what leaks, %"), table
    )


def _tokens(risk: RiskReport) -> Table | None:
    ranked = sorted(risk.tokens, key=lambda t: (-t.move, t.context))
    if not ranked:
        return None
    top = max(ranked[0].move, 1e-12)
    rows = tuple(
        (_in_context(t.context, t.token), visible(t.domain), Bar(percent(t.move), t.move / top))
        for t in ranked[:12]
    )
    return Table(
        "Words in context that would move most",
        ("Context", "Kind of text", "Moves by (of its size)"),
        rows,
        frozenset(),
        left_out(len(ranked), 12),
    )


def _in_context(context: str, token: str) -> Quote:
    """The context with its token marked, where the token ends it (as the risk room writes it)."""
    if token and context.endswith(token):
        return Quote(excerpt(context[: -len(token)], 70), excerpt(token))
    return Quote(excerpt(context, 70) + " · ", excerpt(token))


_ALTERNATIVE = (
    "The policy would rather have this fact held to a context than overwritten; that form is prepared beside the plan, "
    "as in_context.jsonl, for the editor contextual."
)


def limits(audit: AuditReport) -> Section:
    """The policy's limits before the write."""
    judged = audit.plan.judgement
    lead = [f"{visible(judged.reason).rstrip('.')}."] if judged.verdict == "pass" and judged.reason else []
    lead += [] if judged.findings else ["The policy has no limit for this stage."]
    lead += [_ALTERNATIVE] if audit.plan.alternative else []
    tables = [limits_table(audit, "Limits before the write", judged.findings)] if judged.findings else []
    tables.append(
        scores_table(
            "Every score measured before the write", audit.plan.risk.scores, audit.plan.risk.evidence
        )
    )
    return Section("limits", "The policy's limits, before the write", tuple(lead), (), tuple(tables))
