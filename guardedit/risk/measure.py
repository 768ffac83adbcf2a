"""All three stages in one report. `SCORES` is the table that a new score joins and policies name metrics from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from guardedit.edits.deltas import EditDelta, encode
from guardedit.errors import BadRequestError
from guardedit.models.handle import preserved
from guardedit.records import EditRequest, RiskReport, Score, digest_of, digest_of_bytes
from guardedit.risk.context import RiskContext
from guardedit.risk.delta_stage import DELTA_SCORES, delta_risk
from guardedit.risk.delta_view import DeltaView
from guardedit.risk.key_stage import KEY_SCORES, key_risk, measure_key
from guardedit.risk.key_view import KeyView, fill_surprises, views_of
from guardedit.risk.neighbours import ProbeSizes
from guardedit.risk.rehearsal import REHEARSAL_SCORES, RehearsalRisk, RehearsalView, rehearsal_risk
from guardedit.risk.scores import ScoreRule, worst_of

__all__ = ["SCORES", "ProbeSizes", "RiskContext", "measure", "measure_key", "measure_keys"]

SCORES: Mapping[str, ScoreRule[Any]] = {**KEY_SCORES, **DELTA_SCORES, **REHEARSAL_SCORES}
"""Every pre-op score by name; policies and MLflow call them "preop/<name>"."""


def measure(
    context: RiskContext,
    requests: Sequence[EditRequest],
    delta: EditDelta,
    others: Sequence[RiskContext] = (),
    views: Sequence[KeyView] | None = None,
) -> RiskReport:
    """What a solved delta for these requests would do to everything else. Nothing is written.

    Key scores are the worst over the requests, at `context`'s layer; the delta is measured as one, summed over its
    layers, of which `others` are the contexts beside `context`. `views` are those of `views_of`, where the keys have
    been looked at before. The same inputs give the same report apart from `seconds`. Raises BadRequestError for
    requests that cannot be understood.
    """
    if not requests:
        raise BadRequestError("no requests to measure")
    with preserved(context.handle):
        return _measure(context, requests, delta, tuple(others), tuple(views or ()))


def measure_keys(views: Sequence[KeyView]) -> RiskReport:
    """What is known of requests before anything is solved: the worst key scores."""
    context, seconds = views[0].context, dict[str, float]()
    with preserved(context.handle), _timed(seconds, "key"):
        scores = worst_key_scores(views)
    asked = {"requests": digest_of([view.request.model_dump(mode="json") for view in views])}
    notes = (*context.remarks, "nothing was solved: no score of an update, and nothing was rehearsed")
    return RiskReport(scores=scores, notes=notes, inputs=asked | _statistics(context), seconds=seconds)


def _measure(
    context: RiskContext,
    requests: Sequence[EditRequest],
    delta: EditDelta,
    others: tuple[RiskContext, ...],
    views: tuple[KeyView, ...],
) -> RiskReport:
    seconds: dict[str, float] = {}
    with _timed(seconds, "key"):
        views = views or views_of(context, requests)
        key_scores = worst_key_scores(views)
    with _timed(seconds, "delta"):
        on_delta = delta_risk(DeltaView(context, views, delta, others))
    with _timed(seconds, "rehearsal"):
        on_probes = rehearsal_risk(RehearsalView(context, views, delta))
    return RiskReport(
        scores=(*key_scores, *on_delta.scores, *on_probes.scores),
        latents=on_delta.latents,
        tokens=on_delta.tokens,
        probes=on_probes.probes,
        notes=_notes((context, *others), on_probes),
        inputs=_inputs((context, *others), requests, delta, on_probes),
        seconds=seconds,
    )


def worst_key_scores(views: Sequence[KeyView]) -> tuple[Score, ...]:
    """Per score, the worst over the requests."""
    if len(views) > 1:
        fill_surprises(views)
    by_request = [key_risk(view).scores for view in views]
    subjects = [view.request.subject for view in views]
    columns = zip(*by_request, strict=True)
    return tuple(
        worst_of(rule, column, subjects) for rule, column in zip(KEY_SCORES.values(), columns, strict=True)
    )


def _notes(contexts: Sequence[RiskContext], on_probes: RehearsalRisk) -> tuple[str, ...]:
    remarks = list(on_probes.notes)
    for one in contexts:
        remarks += one.remarks
        if one.second_moment is not None and one.second_moment.warning is not None:
            remarks.append(one.second_moment.warning)
        if one.key_sae is None:
            where = "" if len(contexts) == 1 else f" of layer {one.layer}"
            remarks.append(f"no SAE on the key space{where}: the concepts at risk are not named")
    return tuple(remarks)


def _inputs(
    contexts: Sequence[RiskContext],
    requests: Sequence[EditRequest],
    delta: EditDelta,
    on_probes: RehearsalRisk,
) -> dict[str, str]:
    """Digests of everything the scores were computed from."""
    inputs = {
        "requests": digest_of([request.model_dump(mode="json") for request in requests]),
        "delta": digest_of_bytes(encode(delta)),
        "prompts": digest_of([prompts.model_dump(mode="json") for prompts in on_probes.prompts]),
    }
    for one in contexts:
        where = "" if one is contexts[0] else f" of layer {one.layer}"
        inputs |= {f"{name}{where}": digest for name, digest in _statistics(one).items()}
    return inputs


def _statistics(context: RiskContext) -> dict[str, str]:
    """Digests of one layer's statistics, banks and SAE."""
    moment = context.second_moment
    found = {"key_bank": context.bank.digest, "protected_bank": context.protected.digest}
    if moment is not None:
        found["second_moment_corpus"] = moment.corpus_digest
        found["second_moment_upstream"] = moment.upstream_digest
        if moment.digest:
            found["second_moment"] = moment.digest
    if context.key_sae is not None:
        found["key_sae"] = context.key_sae.digest
    return found


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 4)
