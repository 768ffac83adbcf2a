"""The report's last sections: what was not measured, the versions and how to undo, people, provenance."""

from __future__ import annotations

from guardedit.audit.sheet import Cell, Code, Section, Table
from guardedit.audit.story import undone_on_request
from guardedit.audit.words import hand, number, quantity, score_title, short, visible, when
from guardedit.records import ABSENT, AuditReport


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
            " × ".join(map(str, c.shape)) + (" bytes" if c.acts else ""),
            c.dtype,
            "full" if c.rank is None else str(c.rank),
            quantity(c.delta_norm_ratio, "", 3) if c.weight_norm else "no weight",
            "not there" if c.digest_before == ABSENT else Code(short(c.digest_before)),
            Code(short(c.digest_after)),
        )
        for c in audit.plan.delta.changes
    )
    tables = (
        Table("Digests of the model", ("When", "Digest", "What it is"), rows),
        Table(
            "Tensors that the plan changes"
            if not any(c.acts for c in audit.plan.delta.changes)
            else "What the plan changes",
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
            "Undo puts the stored original bytes back; the digest, computed again from the bytes, is then the one "
            "under “Before”. Later edits of the same tensor must be undone first."
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
    rows_ = (
        (
            d.outcome,
            hand(d),
            visible(d.reason),
            when(d.at),
            Code(short(d.plan_digest)),
        ),
    )
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
        **{f"second moment {hook}": d for hook, d in plan.delta.statistics_digests.items()},
        **plan.risk.inputs,
        **(audit.drift.inputs if audit.drift else {}),
    }
    settings = {
        **plan.delta.hparams,
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
