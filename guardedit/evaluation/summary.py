"""From case results to the figures that are reported, each with its interval and the unedited model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardedit.evaluation.bootstrap import Estimate, estimate
from guardedit.evaluation.metrics import case_metrics, failed_metrics, harmonic_mean
from guardedit.evaluation.state import CaseResult
from guardedit.records import Record

PROTOCOL = (
    "one edit at a time on the unedited model, taken back after each; teacher-forced targets, P(o) = geometric mean "
    "of token probabilities; mean over prompts, then over cases; 95 % percentile bootstrap over cases"
)


class Evaluation(Record):
    """The outcome of one evaluation; `as_json` is what programs read."""

    n: int
    """Cases edited."""
    n_seen: int
    """Cases looked at to find them (more than n where only known facts are taken)."""
    failed: int
    """Cases whose edit could not be solved; they count as not effective."""
    metrics: dict[str, Estimate | None]
    """Of the first variant; `…_base` is the unedited model."""
    variants: dict[str, dict[str, Estimate | None]]
    """Of each variant of the prompts."""
    score: dict[str, float]
    """Harmonic mean of efficacy, paraphrase and neighborhood, by variant."""
    seconds_per_edit: float
    """Mean time to solve one."""
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
    """Figures over all results; the order of the results does not matter."""
    ordered = sorted(results, key=lambda result: result.case_id)
    variants = {name: _variant(ordered, name, seed) for name in (ordered[0].before if ordered else ())}
    return Evaluation(
        n=len(ordered),
        n_seen=n_seen,
        failed=sum(result.after is None for result in ordered),
        metrics=next(iter(variants.values()), {}),
        variants=variants,
        score={name: value for name, found in variants.items() if (value := _score(found)) is not None},
        seconds_per_edit=sum(result.seconds for result in ordered) / len(ordered) if ordered else 0.0,
        seconds=seconds,
        about={"protocol": PROTOCOL, "seed": seed, **about},
    )


def _variant(results: Sequence[CaseResult], variant: str, seed: int) -> dict[str, Estimate | None]:
    before = [case_metrics(result.before[variant]) for result in results]
    after = [
        failed_metrics(result.before[variant])
        if result.after is None
        else case_metrics(result.after[variant])
        for result in results
    ]
    figures: dict[str, Estimate | None] = {}
    for name in after[0]:
        figures[name] = estimate([row[name] for row in after], seed)
        figures[f"{name}_base"] = estimate([row[name] for row in before], seed)
    for name in ("neighborhood", "distractor_neighborhood"):
        losses = [_minus(b[name], a[name]) for b, a in zip(before, after, strict=True)]
        figures[f"{name}_loss"] = estimate(losses, seed, signed=True)
    return figures


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _score(metrics: dict[str, Estimate | None]) -> float | None:
    parts = [metrics[name] for name in ("efficacy", "paraphrase", "neighborhood")]
    return harmonic_mean([part.value for part in parts if part]) if all(parts) else None


def markdown(evaluation: Evaluation) -> str:
    """A table for the docs: one row a metric and variant, edited and unedited side by side."""
    lines = ["| prompts | metric | edited | 95 % interval | unedited | cases |", "|---|---|---|---|---|---|"]
    for variant, metrics in evaluation.variants.items():
        for name, figure in metrics.items():
            if figure is None or name.endswith("_base"):
                continue
            base = metrics.get(f"{name}_base")
            beside = f"{base.value:.3f}" if base else ""
            interval = f"{figure.low:.3f} to {figure.high:.3f}"
            lines.append(f"| {variant} | {name} | {figure.value:.3f} | {interval} | {beside} | {figure.n} |")
    return "\n".join(lines) + "\n"
