"""The report's sections about the staged copy, the versions, and the record itself."""

from __future__ import annotations

import math

from guardedit.audit.before import ROWS, left_out, limits_table, probes_table, scores_table
from guardedit.audit.sheet import Cell, Code, Intervals, Picture, Point, Section, Table, Volcano
from guardedit.audit.story import undone_on_request
from guardedit.audit.words import (
    KINDS,
    SCOPES,
    Sign,
    excerpt,
    number,
    percent,
    quantity,
    score_title,
    short,
    visible,
    when,
)
from guardedit.records import AuditReport, DriftReport, LatentDrift

_YES, _NO = Sign("✓", "yes", "good"), Sign("✗", "no", "bad")
_QUIET_POINTS = 1200


def drift(audit: AuditReport) -> tuple[Section, ...]:
    """What the monitor found; one plain sentence where nothing was monitored."""
    if audit.drift is None:
        why = (
            "No staged copy was made, so there was nothing to monitor."
            if audit.digest_staged is None
            else "The staged copy was not monitored."
        )
        return (Section("drift", "What changed in the staged copy", (why,)),)
    found = [_measured(audit, audit.drift)]
    if audit.drift_base is not None:
        found.append(_measured(audit, audit.drift_base))
    return tuple(found)


def _measured(audit: AuditReport, report: DriftReport) -> Section:
    base = report.reference == "base"
    lead = (
        "The same tokens were read by the base model that this line of edits began with and by the staged copy: the sum of all edits so far."
        if base
        else "The same tokens were read by the version before and by the staged copy. Whatever differs comes from the edit."
    )
    pictures = [p for p in (_domains(report), _volcano(report)) if p]
    missing = [] if report.latents else ["Latents were not compared."]
    missing += [] if report.domains else ["Behaviour on control text was not compared."]
    tables = (
        [limits_table(audit, "Limits on the staged copy", audit.postop.findings)]
        if audit.postop and not base
        else []
    )
    prompts = probes_table("Prompts before and after", report.probes)
    tables += [prompts] if prompts else []
    tables += [_integrity(report)] if report.integrity else []
    tables += [scores_table("Every score of this comparison", report.scores)]
    title = "What changed since the base model" if base else "What changed in the staged copy"
    return Section(
        "drift-base" if base else "drift",
        title,
        (lead, *missing),
        tuple(_renamed(p, base) for p in pictures),
        tuple(tables),
    )


def _renamed(picture: Picture, base: bool) -> Picture:
    name = f"{picture.name}-base" if base else picture.name
    return Picture(name, picture.title, picture.description, picture.data, picture.table)


def _domains(report: DriftReport) -> Picture | None:
    rows = report.domains
    if not rows:
        return None
    table = Table(
        "Behaviour by kind of text",
        (
            "Text",
            "About",
            "KL, nats",
            "95 % interval",
            "Perplexity ratio",
            "Answers lost",
            "Sequences",
            "Tokens",
        ),
        tuple(
            (
                visible(d.domain),
                SCOPES[d.scope],
                quantity(d.kl_nats, ""),
                f"{quantity(d.kl_low, '')} to {quantity(d.kl_high, '')}",
                quantity(d.perplexity_ratio, "", 5),
                percent(d.lost_top1),
                f"{d.n_sequences:,}",
                f"{d.n_tokens:,}",
            )
            for d in rows
        ),
        frozenset(range(2, 8)),
        folded=True,
    )
    worst = max(rows, key=lambda d: d.kl_nats)
    told = (
        f"The answers moved most on {visible(worst.domain)} ({SCOPES[worst.scope]}): KL {quantity(worst.kl_nats, 'nats')}, "
        f"interval {quantity(worst.kl_low, '')} to {quantity(worst.kl_high, '')}. None of these texts is meant to change."
    )
    bars = tuple(
        (f"{excerpt(d.domain, 30)}  ·  {SCOPES[d.scope]}", d.kl_nats, d.kl_low, d.kl_high) for d in rows
    )
    return Picture(
        "domains",
        "How far the model's answers moved, by kind of text",
        told,
        Intervals(bars, "KL to the version before, nats (95 % interval)"),
        table,
    )


def _volcano(report: DriftReport) -> Picture | None:
    if not report.latents:
        return None
    ranked = sorted(
        report.latents,
        key=lambda x: (
            not x.significant,
            x.p_value,
            -abs(x.rate_after - x.rate_before),
            x.hook_name,
            x.latent,
        ),
    )
    loud = [x for x in ranked if x.significant]
    points = tuple(_point(x) for x in loud + [x for x in ranked if not x.significant][:_QUIET_POINTS])
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            KINDS[x.kind],
            Code(x.hook_name),
            str(x.latent),
            excerpt(x.label, 50),
            SCOPES[x.scope],
            f"{percent(x.rate_before)} → {percent(x.rate_after)}",
            percent(x.turnover),
            quantity(x.p_value, "", 2),
        )
        for x in ranked[:ROWS]
    )
    table = Table(
        "Latents with the strongest evidence of change",
        ("Kind", "Watched at", "Latent", "Active at", "On", "Firing rate", "Turnover", "p"),
        rows,
        frozenset({2, 5, 6, 7}),
        left_out(len(ranked), ROWS),
        folded=True,
    )
    counts = ", ".join(f"{sum(x.kind == kind for x in loud)} {kind}" for kind in KINDS)
    told = (
        f"{len(ranked):,} latents compared, {len(loud)} changed beyond chance and the effect floor: {counts}."
    )
    return Picture(
        "volcano", "Concepts that fire more or less often than before", told, Volcano(points), table
    )


def _point(x: LatentDrift) -> Point:
    evidence = -math.log10(max(x.p_value, 1e-12))
    return Point(100 * (x.rate_after - x.rate_before), evidence, x.kind, x.significant, excerpt(x.label, 28))


def _integrity(report: DriftReport) -> Table:
    rows = tuple((_YES if ok else _NO, visible(what)) for what, ok in sorted(report.integrity.items()))
    return Table("Facts that must hold", ("Holds", "Fact"), rows)


def unmeasured(audit: AuditReport) -> Section:
    """What was not measured, and the smallest effect that could have been seen."""
    items = dict.fromkeys(audit.not_measured)
    blanks = [s for s in audit.plan.risk.scores if s.value is None]
    tables: list[Table] = []
    if audit.drift is not None:
        items.update(dict.fromkeys(audit.drift.not_measured))
        blanks += [s for s in audit.drift.scores if s.value is None]
        rows = tuple((score_title(k), number(v), Code(k)) for k, v in sorted(audit.drift.resolution.items()))
        if rows:
            tables = [
                Table(
                    "Smallest effect that this monitoring could have shown",
                    ("Of", "Smallest", "Name"),
                    rows,
                    frozenset({1}),
                )
            ]
    items.update({f"{score_title(s.name)}: {s.reason or 'no reason recorded'}": None for s in blanks})
    lead = (
        "A limit that was kept says nothing about what was not looked at."
        if items
        else "Nothing is recorded as left out."
    )
    if not tables:
        lead += (
            " The smallest effect that could have been seen is not recorded, because nothing was monitored."
            if audit.drift is None
            else " The smallest effect that could have been seen is not recorded."
        )
    return Section(
        "unmeasured", "What was not measured", (lead,), (), tuple(tables), items=tuple(map(visible, items))
    )


def versions(audit: AuditReport) -> Section:
    """Digests before, staged and after, and how to undo."""
    same = audit.digest_after == audit.digest_before
    rows: tuple[tuple[Cell, ...], ...] = (
        ("Before", Code(audit.digest_before), "the version the edit was planned on"),
        (
            "Staged",
            Code(audit.digest_staged) if audit.digest_staged else "none was made",
            "the copy that was monitored",
        ),
        (
            "After",
            Code(audit.digest_after),
            "live now: "
            + (
                "the same bytes as before"
                if same
                else "the staged copy"
                if audit.digest_after == audit.digest_staged
                else "another version"
            ),
        ),
    )
    tensors = tuple(
        (
            Code(c.parameter),
            " × ".join(map(str, c.shape)),
            c.dtype,
            "full" if c.rank is None else str(c.rank),
            quantity(c.delta_norm_ratio, "", 3),
            Code(short(c.digest_before)),
            Code(short(c.digest_after)),
        )
        for c in audit.plan.delta.changes
    )
    tables = (
        Table("Digests of the model", ("When", "Digest", "What it is"), rows),
        Table(
            "Tensors that the plan changes",
            ("Parameter", "Shape", "Type", "Rank", "‖ΔW‖ / ‖W‖", "Before", "After"),
            tensors,
            frozenset({3, 4}),
        ),
    )
    lead, commands = _undo(audit)
    return Section("versions", "Versions, and how to undo", (lead,), (), tables, commands)


def _undo(audit: AuditReport) -> tuple[str, tuple[str, ...]]:
    plan, edit = visible(audit.plan.plan_id), visible(audit.edit_id)
    if audit.outcome == "committed":
        lead = (
            "Undo puts the stored original bytes back; the digest, computed again from the bytes, is then the one under “Before”. "
            "Later edits of the same tensor must be undone first."
        )
        return lead, (f"guardedit rollback {edit}", "guardedit verify")
    if audit.outcome in ("needs-approval", "held"):
        return "To decide, name the plan; the word is bound to its digest.", (
            f"guardedit show {plan}",
            f"guardedit approve {plan}",
            f"guardedit reject {plan}",
        )
    if audit.outcome == "auto-approved":
        return "Nothing has been written, so there is nothing to undo.", (f"guardedit apply {plan}",)
    if undone_on_request(audit):
        return "The edit has been undone. This checks the bytes once more:", ("guardedit verify",)
    return "The live model was never touched, so there is nothing to undo. This checks it:", (
        "guardedit verify",
    )


def people(audit: AuditReport) -> Section:
    """Waivers and decisions, with author and reason."""
    tables = []
    waivers = {
        (w.metric, w.author, w.reason, w.expires): w
        for w in (*audit.plan.waivers, *(f.waiver for f in audit.plan.judgement.findings if f.waiver))
    }
    if waivers:
        rows = tuple(
            (Code(w.metric), visible(w.author), visible(w.reason), when(w.expires)) for w in waivers.values()
        )
        tables.append(Table("Waivers", ("Limit", "By", "Reason", "Ends"), rows))
    lead = "No limit was waived." if not waivers else ""
    if audit.decision is None:
        return Section(
            "people",
            "Decisions and waivers",
            tuple(p for p in (lead, "Nobody has decided on this plan.") if p),
            (),
            tuple(tables),
        )
    d = audit.decision
    rows_ = ((d.outcome, visible(d.approver), visible(d.reason), when(d.at), Code(short(d.plan_digest))),)
    tables.insert(0, Table("Decision", ("Word", "By", "Reason", "When", "On plan digest"), rows_))
    bound = (
        ""
        if d.plan_digest == audit.plan_digest
        else "The decision names another plan digest than this report's plan: it does not cover this plan."
    )
    return Section("people", "Decisions and waivers", tuple(p for p in (bound, lead) if p), (), tuple(tables))


def provenance(audit: AuditReport) -> Section:
    """Everything needed to measure it again."""
    plan = audit.plan
    facts: list[tuple[Cell, ...]] = [
        ("Plan", Code(visible(plan.plan_id))),
        ("Plan digest", Code(audit.plan_digest)),
        ("Policy digest", Code(plan.policy_digest)),
        ("Model", f"{visible(plan.model_name)}"),
        ("Base of this line of edits", Code(plan.base_digest)),
        ("Editor", visible(plan.editor)),
        ("File of the change", Code(plan.delta.file_digest)),
        ("Seed", str(plan.seed)),
        ("Planned", when(plan.created)),
        ("Reported", when(audit.created)),
        (
            "MLflow run",
            Code(audit.mlflow_run_id) if audit.mlflow_run_id else visible(audit.mlflow_note or "none"),
        ),
    ]
    if audit.mlflow_run_id and audit.mlflow_note:
        facts.append(("MLflow", visible(audit.mlflow_note)))
    inputs = {
        **plan.delta.statistics_digests,
        **plan.risk.inputs,
        **(audit.drift.inputs if audit.drift else {}),
    }
    settings = {
        **{k: v for k, v in plan.delta.hparams.items()},
        **{f"found: {k}": v for k, v in plan.delta.diagnostics.items()},
    }
    tables = [Table("Identity", ("What", "Value"), tuple(facts))]
    tables += (
        [
            Table(
                "Inputs by digest",
                ("Input", "Digest"),
                tuple((visible(k), Code(visible(v))) for k, v in sorted(inputs.items())),
                folded=True,
            )
        ]
        if inputs
        else []
    )
    tables += [
        Table(
            "Versions of software",
            ("Name", "Version"),
            tuple((visible(k), visible(v)) for k, v in sorted(plan.versions.items())),
            folded=True,
        )
    ]
    tables += (
        [
            Table(
                "Settings of the editor, and what it found",
                ("Name", "Value"),
                tuple((visible(k), _plain(v)) for k, v in settings.items()),
                frozenset({1}),
                folded=True,
            )
        ]
        if settings
        else []
    )
    return Section("provenance", "Provenance", (), (), tuple(tables))


def _plain(value: float | int | str | bool | None) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return visible(value) if isinstance(value, str) else number(value)
