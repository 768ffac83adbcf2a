"""The report's sections about the staged copy: what the monitor found there."""

from __future__ import annotations

import math

from guardedit.audit.sheet import Cell, Code, Intervals, Picture, Point, Section, Table, Volcano
from guardedit.audit.tables import ROWS, left_out, limits_table, probes_table, scores_table
from guardedit.audit.words import (
    KINDS,
    SCOPES,
    Sign,
    excerpt,
    percent,
    quantity,
    visible,
)
from guardedit.records import AuditReport, DomainDrift, DriftReport, LatentDrift

_YES, _NO = Sign("✓", "yes", "good"), Sign("✗", "no", "bad")
_LOUD_POINTS, _QUIET_POINTS = 500, 700
"""Most markers drawn, so that the page stays small; the counts below the title are of all latents."""
_PREVIOUS = "The same tokens were read by the version before and by the staged copy. What differs comes from the edit."
_BASE = (
    "The same tokens were read by the base model that this line of edits began with and by the staged copy: "
    "the sum of all edits so far."
)


def drift(audit: AuditReport) -> tuple[Section, ...]:
    """What the monitor found; one plain sentence where nothing was monitored."""
    if audit.drift is None:
        why = (
            "No staged copy was made, so there was nothing to monitor."
            if audit.digest_staged is None
            else "The staged copy was not monitored."
        )
        return (Section("drift", "What changed in the staged copy", (why,)),)
    return tuple(_measured(r) for r in (audit.drift, audit.drift_base) if r is not None)


def limits(audit: AuditReport) -> tuple[Section, ...]:
    """The policy's limits on the staged copy, if it was judged."""
    if audit.postop is None:
        return ()
    table = limits_table(audit, "Limits on the staged copy", audit.postop.findings)
    lead = (f"{visible(audit.postop.reason).rstrip('.')}.",) if audit.postop.verdict == "pass" else ()
    return (Section("limits-after", "The policy's limits, on the staged copy", lead, (), (table,)),)


def _measured(report: DriftReport) -> Section:
    base = report.reference == "base"
    lead = _BASE if base else _PREVIOUS
    pictures = [p for p in (_domains(report), _volcano(report)) if p]
    missing = [] if report.latents else ["Latents were not compared."]
    missing += [] if report.domains else ["Behaviour on control text was not compared."]
    tables = []
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
    worst = max(rows, key=lambda d: (d.scope not in ("target", "entailed"), d.kl_nats))
    told = (
        f"The answers moved most on {_named(worst)}: KL {quantity(worst.kl_nats, 'nats')}, "
        f"interval {quantity(worst.kl_low, '')} to {quantity(worst.kl_high, '')}. "
        "Only the fact itself and what follows from it are meant to change."
    )
    bars = tuple((_named(d), d.kl_nats, d.kl_low, d.kl_high) for d in rows)
    return Picture(
        "domains",
        "How far the model's answers moved, by kind of text",
        told,
        Intervals(bars, "KL to the version before, nats (95 % interval)"),
        table,
    )


def _named(d: DomainDrift) -> str:
    about = SCOPES[d.scope]
    return about if d.domain == d.scope else f"{about}: {excerpt(d.domain, 30)}"


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
    quiet = [x for x in ranked if not x.significant]
    points = tuple(_point(x) for x in loud[:_LOUD_POINTS] + quiet[:_QUIET_POINTS])
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
    told = f"{len(ranked):,} latents are on record, {len(loud)} changed beyond chance and the effect floor: {counts}."
    return Picture(
        "volcano", "Concepts that fire more or less often than before", told, Volcano(points), table
    )


def _point(x: LatentDrift) -> Point:
    evidence = -math.log10(max(x.p_value, 1e-12))
    return Point(100 * (x.rate_after - x.rate_before), evidence, x.kind, x.significant, excerpt(x.label, 28))


def _integrity(report: DriftReport) -> Table:
    rows = tuple((_YES if ok else _NO, visible(what)) for what, ok in sorted(report.integrity.items()))
    return Table("Facts that must hold", ("Holds", "Fact"), rows)
