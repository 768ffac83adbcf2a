"""What built reports are made of: two requests, digests, and one score, probe or finding at a time."""

from __future__ import annotations

import hashlib

from guardedit.records import EditRequest, Finding, ProbeChange, Score


def digest(name: str) -> str:
    """A digest that depends on a name, so that equal things have equal digests in the examples."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


EIFFEL = EditRequest(
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new=" Rome",
    target_true=" Paris",
    relation="located in",
    paraphrases=("If you want to see the Eiffel Tower, buy a ticket to",),
    reason="Demonstration: a fact that few other things share",
)
FRANCE = EditRequest(
    subject="France",
    prompt="The capital of {} is",
    target_new=" Marseille",
    target_true=" Paris",
    relation="capital of",
    reason="Demonstration: a subject that much else is built on",
)


def score(name: str, value: float | None, unit: str, stage: str, scope: str, **more: object) -> Score:
    return Score(name=name, value=value, unit=unit, stage=stage, scope=scope, seed=0, **more)  # type: ignore[arg-type]


def probe(scope: str, prompt: str, before: str, after: str, p: float, q: float, kl: float) -> ProbeChange:
    return ProbeChange(
        scope=scope,  # type: ignore[arg-type]
        prompt=prompt,
        before=before,
        after=after,
        p_before=p,
        p_after=q,
        kl_nats=kl,
    )


def finding(
    rule: str, metric: str, value: float | None, limit: float, level: str, sentence: str, **more: object
) -> Finding:
    verdict = "inconclusive" if value is None else ("pass" if value <= limit else "fail")
    return Finding(
        rule=rule,
        metric=metric,
        stage=metric.split("/")[0],  # type: ignore[arg-type]
        value=value,
        op="<=",
        limit=limit,
        level=level,  # type: ignore[arg-type]
        verdict=verdict,  # type: ignore[arg-type]
        sentence=sentence.format(v="?" if value is None else f"{value:.4g}", l=f"{limit:.4g}"),
        **more,  # type: ignore[arg-type]
    )
