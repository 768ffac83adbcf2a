"""From case results to the figures that are reported, each with its interval and the unedited model beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from guardedit.evaluation.bootstrap import Estimate, estimate
from guardedit.evaluation.metrics import (
    PROTOCOLS,
    WANTS_NEW,
    case_metrics,
    failed_metrics,
    harmonic_mean,
)
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.state import CaseResult
from guardedit.records import Record

HOW = (
    "teacher-forced targets unless the name says otherwise, P(o) = geometric mean of token probabilities; mean over "
    "prompts, then over cases; 95 % percentile bootstrap over cases"
)
ALWAYS = tuple(name + suffix for suffix in ("", "_argmax", "_magnitude") for name in (
    "efficacy", "paraphrase", "neighborhood", "distractor_neighborhood"))  # fmt: skip
"""Metrics that are in every outcome, null where the data has no prompt for them."""
NO_SHARES = ("kl_nats", "perplexity", "fluency", "magnitude")
"""Parts of the names of metrics that are no share of anything."""
LOSSES = ("neighborhood", "distractor_neighborhood")
CURVE = (
    "efficacy", "paraphrase", "neighborhood", "distractor_neighborhood", "portability", "locality",
    "neighborhood_lost_top1", "same_subject_lost_top1", "same_subject_kl_nats", "efficacy_generated", "fluency",
    "far_kl_nats", "perplexity_ratio", "perplexity_held_out", "ability_arithmetic", "ability_syllogisms",
    "ability_minimal_pairs",
)  # fmt: skip
"""Metrics that are followed over the number of edits."""
_GROUPS_AS_UNITS = 10
"""From this many batches, sequences or single edits on, they are the units that a whole model's figures vary over."""

Figures = dict[str, Estimate | None]


class Point(Record):
    """The model after so many edits."""

    edits: int
    metrics: Figures


class Evaluation(Record):
    """The outcome of one evaluation; `as_json` is what programs read."""

    n: int
    """Cases edited."""
    n_seen: int
    """Cases looked at to find them (more than n where only known facts are taken)."""
    failed: int
    """Cases whose edit could not be solved; they count as not effective."""
    metrics: Figures
    """Of the first variant; `…_base` is the unedited model."""
    variants: dict[str, Figures]
    """Of each variant of the prompts."""
    score: dict[str, float]
    """Harmonic mean of efficacy, paraphrase and neighborhood, by variant."""
    curve: tuple[Point, ...] = ()
    """Of the first variant, from the unedited model (0 edits) on."""
    seconds_per_edit: float
    """Mean time to solve one."""
    seconds_per_case: float = 0.0
    """Mean time to measure one, both sides."""
    seconds: float
    about: dict[str, Any]
    """What was measured: editor, settings, digests, seed, protocol."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, `about` laid open beside the figures."""
        plain = self.model_dump(mode="json")
        return {**plain, **plain.pop("about")}


def summarise(
    results: Sequence[CaseResult], *, about: dict[str, Any], n_seen: int, seconds: float, seed: int
) -> Evaluation:
    """Figures over all results; the order of the results does not matter.

    A case that was measured at several numbers of edits counts with its last measurement.
    """
    ordered = sorted(results, key=lambda result: (result.case_id, result.edits))
    final = list({result.case_id: result for result in ordered}.values())
    fresh = list({result.case_id: result for result in reversed(ordered)}.values())[::-1]
    variants = {name: _variant(final, name, seed) for name in (final[0].before if final else ())}
    if len(ordered) > len(final):
        for name, figures in variants.items():
            figures.update(_retention(fresh, final, name, seed))
    headline = next(iter(variants), "")
    if final:
        variants[headline].update(_whole(final, seed))
    return Evaluation(
        n=len(final),
        n_seen=n_seen,
        failed=sum(result.after is None or result.error is not None for result in final),
        metrics=next(iter(variants.values()), {}),
        variants=variants,
        score={name: value for name, found in variants.items() if (value := _score(found)) is not None},
        curve=_curve(ordered, headline, seed),
        seconds_per_edit=sum(r.seconds for r in final) / len(final) if final else 0.0,
        seconds_per_case=sum(r.seconds_measuring for r in final) / len(final) if final else 0.0,
        seconds=seconds,
        about={"protocol": _sentence(about), "protocols": PROTOCOLS, "seed": seed, **about},
    )


def _sentence(about: dict[str, Any]) -> str:
    return f"{Protocol(**about.get('edits', {})).sentence()}; {HOW}"


def _after(result: CaseResult, variant: str) -> dict[str, float | None]:
    """Metrics after the edit. What could not be solved is no success, whatever the model says."""
    if result.after is None:
        return failed_metrics(result.before[variant])
    found = result.after[variant]
    return failed_metrics(found) if result.error is not None else case_metrics(found)


def _variant(
    results: Sequence[CaseResult], variant: str, seed: int, only: Sequence[str] | None = None
) -> Figures:
    before = [case_metrics(result.before[variant]) for result in results]
    after = [_after(result, variant) for result in results]
    figures: Figures = {}
    for name in dict.fromkeys(name for row in after for name in row if only is None or name in only):
        edited, base = (_estimate(name, [row.get(name) for row in rows], seed) for rows in (after, before))
        if edited is not None or name in ALWAYS:
            figures[name] = edited
        if base is not None or name in ALWAYS:
            figures[f"{name}_base"] = base
    for name in LOSSES if only is None else ():
        losses = [_minus(b.get(name), a.get(name)) for b, a in zip(before, after, strict=True)]
        figures[f"{name}_loss"] = estimate(losses, seed, signed=True)
    return figures


def _estimate(name: str, values: Sequence[float | None], seed: int) -> Estimate | None:
    return estimate(values, seed, share=not any(unit in name for unit in NO_SHARES))


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _retention(fresh: Sequence[CaseResult], final: Sequence[CaseResult], variant: str, seed: int) -> Figures:
    """What the edits were worth right after they were made, and of those that had worked, how many still do."""
    pairs = [(_after(old, variant), _after(new, variant)) for old, new in zip(fresh, final, strict=True)]
    figures: Figures = {}
    for suffix in ("", "_argmax"):
        for name in WANTS_NEW:
            written = [old.get(name + suffix) for old, _ in pairs]
            figures[f"{name}{suffix}_when_written"] = estimate(written, seed)
        kept = [new[f"efficacy{suffix}"] if old[f"efficacy{suffix}"] == 1.0 else None for old, new in pairs]
        figures[f"retention{suffix}"] = estimate(kept, seed)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _whole(results: Sequence[CaseResult], seed: int) -> Figures:
    """Figures of the edited models as a whole, and of the unedited one."""
    edited = _units([result.whole for result in results if result.whole], seed)
    base = _units([result.whole_base for result in results if result.whole_base][:1], seed)
    return {**edited, **{f"{name}_base": figure for name, figure in base.items()}}


def _units(groups: Sequence[dict[str, tuple[float, ...]]], seed: int) -> Figures:
    """Intervals over groups where there are ten or more, else over text rows or items, averaged over the groups."""
    figures: Figures = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        table = np.array([group[name] for group in groups if name in group], dtype=np.float64)
        values = table.mean(1) if len(table) >= _GROUPS_AS_UNITS else table.mean(0)
        found = _estimate(name, [float(value) for value in values], seed)
        # Perplexities are kept as logarithms: their mean is a mean of nats.
        figures[name] = _mapped(found, math.exp) if name.startswith("perplexity") else found
    return figures


def item_figures(values: Mapping[str, tuple[float, ...]], seed: int) -> Figures:
    """Figures of one model as a whole, with intervals over items and text rows."""
    return _units([dict(values)], seed)


def _mapped(figure: Estimate | None, through: Callable[[float], float]) -> Estimate | None:
    """The figure on another, rising scale."""
    if figure is None:
        return None
    ends = {name: through(min(getattr(figure, name), 700.0)) for name in ("value", "low", "high")}
    return Estimate(n=figure.n, **ends)


def _curve(results: Sequence[CaseResult], variant: str, seed: int) -> tuple[Point, ...]:
    """The followed metrics over the number of edits, 0 first. Every case counts that was edited by then."""
    marks = sorted({result.edits for result in results if result.checkpoint})
    points: list[Point] = []
    for mark in marks:
        at = [result for result in results if result.edits == mark and result.checkpoint]
        figures = {**_variant(at, variant, seed, CURVE), **_whole(at, seed)}
        if mark == marks[-1]:
            base = {name: figures.get(f"{name}_base") for name in CURVE}
            points.insert(0, Point(edits=0, metrics=_known(base)))
        points.append(Point(edits=mark, metrics=_known({name: figures.get(name) for name in CURVE})))
    return tuple(points)


def _known(figures: Figures) -> Figures:
    return {name: figure for name, figure in figures.items() if figure is not None}


def _score(metrics: Figures) -> float | None:
    parts = [metrics.get(name) for name in ("efficacy", "paraphrase", "neighborhood")]
    return harmonic_mean([part.value for part in parts if part]) if all(parts) else None


def markdown(evaluation: Evaluation) -> str:
    """Tables for the docs: one row a metric and variant, edited and unedited side by side; then over the edits."""
    lines = ["| prompts | metric | edited | 95 % interval | unedited | cases |", "|---|---|---|---|---|---|"]
    for variant, metrics in evaluation.variants.items():
        for name, figure in metrics.items():
            if figure is None or name.endswith("_base"):
                continue
            base = metrics.get(f"{name}_base")
            beside = f"{base.value:.3f}" if base else ""
            interval = f"{figure.low:.3f} to {figure.high:.3f}"
            lines.append(f"| {variant} | {name} | {figure.value:.3f} | {interval} | {beside} | {figure.n} |")
    text = "\n".join(lines) + "\n"
    return text + _curve_table(evaluation.curve) if len(evaluation.curve) > 2 else text


def _curve_table(points: Sequence[Point]) -> str:
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    lines = ["", f"| edits | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for point in points:
        cells = [f"{f.value:.3f}" if (f := point.metrics.get(name)) else "" for name in names]
        lines.append(f"| {point.edits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
