"""What edits with such scores did before: the kit's risk model read for one plan, as scores that a policy may limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from guardedit.records import RiskReport, Scope, Score
from guardedit.risk.calibration import Expectation, RiskModel

EXPECTED: Mapping[Scope, str] = {
    "far": "expected_far_kl", "near": "expected_near_kl", "subject": "expected_subject_kl",
}  # fmt: skip
"""Scope -> score."""
HARM = "harm_probability"
"""The largest of the scopes' probabilities of damage among the worst tenth of the edits calibrated on."""
SCORES = (*EXPECTED.values(), HARM)
RISK_MODELS = "risk_models"
"""A kit's folder of a file an editor."""


def load_risk_models(folder: Path, files: Iterable[str]) -> dict[str, RiskModel]:
    """A kit's risk models by editor, none where none was fitted; raises IntegrityError for one that cannot be read."""
    found = [RiskModel.load(folder / name) for name in files if name.startswith(f"{RISK_MODELS}/")]
    return {one.editor: one for one in found}


def with_expectations(
    report: RiskReport, models: Mapping[str, RiskModel], editor: str, layers: Sequence[int], many: bool
) -> RiskReport:
    """The report with the risk model's scores behind its own; unchanged where the kit has no risk model at all.

    A plan of many, of another editor or of other layers than the model was fitted on has no value and says why: the
    gate treats that as inconclusive, not as a pass.
    """
    if not models:
        return report
    model = models.get(editor)
    reason = _unfit(model, editor, layers, many)
    if model is None or reason is not None:
        return report.model_copy(update={"scores": (*report.scores, *_without(reason or ""))})
    said = model.expect({score.name: score.value for score in report.scores})
    scores = (*report.scores, *(_score(one, model) for one in said), _harm(said, model))
    named = {
        "inputs": {**report.inputs, "risk_model": model.digest},
        "evidence": model.evidence(report.scores),
    }
    return report.model_copy(update={"scores": scores, **named})


def _unfit(model: RiskModel | None, editor: str, layers: Sequence[int], many: bool) -> str | None:
    if model is None:
        return f"no risk model of {editor}: guardedit evaluate guard, then guardedit calibrate"
    if many:
        return "the risk model is fitted on single edits, and this plan holds many"
    if tuple(sorted(layers)) != model.layers:
        return f"the risk model is fitted on edits of layers {list(model.layers)}, this one writes {sorted(layers)}"
    return None


def _without(reason: str) -> tuple[Score, ...]:
    told = f"not measured: {reason}"
    named = [
        Score(name=name, value=None, unit="nats", stage="rehearsal", scope=scope, reason=told)
        for scope, name in EXPECTED.items()
    ]  # fmt: skip
    return (
        *named,
        Score(name=HARM, value=None, unit="probability", stage="rehearsal", scope="model", reason=told),
    )


def _score(one: Expectation, model: RiskModel) -> Score:
    fitted = next(s for s in model.scopes if s.scope == one.scope)
    told = (
        f"not measured: {one.reason}"
        if one.value is None
        else f"{fitted.level:.0%} of such edits lie in the interval"
    )
    return Score(
        name=EXPECTED[one.scope], value=one.value, unit="nats", stage="rehearsal", scope=one.scope, n=fitted.n,
        low=one.low, high=one.high, seed=model.seed, reason=told,
    )  # fmt: skip


def _harm(said: Sequence[Expectation], model: RiskModel) -> Score:
    """No value where a scope has none: an edit outside the calibration's support is nobody's to wave through."""
    missing = next((one for one in said if one.p_harm is None), None)
    worst = max(
        (one for one in said if one.p_harm is not None), key=lambda one: one.p_harm or 0.0, default=None
    )
    if missing is not None or worst is None:
        told, value = f"not measured: {missing.reason if missing else 'the model has no scope'}", None
    else:
        limit = next(s.harm_nats for s in model.scopes if s.scope == worst.scope)
        told, value = f"of more than {limit:.2g} nats in the scope {worst.scope!r}", worst.p_harm
    n = max(s.n for s in model.scopes)
    return Score(
        name=HARM,
        value=value,
        unit="probability",
        stage="rehearsal",
        scope="model",
        n=n,
        seed=model.seed,
        reason=told,
    )
