"""Metrics of one case, before or after its edit. Definitions: Meng et al. 2022, appendix B.1, unless it says otherwise.

P(o) is the geometric mean probability of the tokens of target o. `efficacy` is the share of P(new) > P(true) at the
edited prompt, `paraphrase` the same at other wordings, `neighborhood` the share of P(true) > P(new) at other subjects,
`distractor_neighborhood` that with the edited fact stated before (CounterFact+). `…_argmax` asks instead that greedy
decoding begins with the wanted target; `…_magnitude` is the difference of the two probabilities.

A probability that is not finite never counts as a success, whichever side it would favour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from guardedit.evaluation.scoring import TargetScore
from guardedit.records import Record


class PromptScore(Record):
    """Both targets after one prompt."""

    new: TargetScore
    true: TargetScore


class CaseScores(Record):
    """One case on one side of its edit."""

    rewrite: tuple[PromptScore, ...]
    paraphrase: tuple[PromptScore, ...] = ()
    neighborhood: tuple[PromptScore, ...] = ()
    distractor_neighborhood: tuple[PromptScore, ...] = ()


KINDS = tuple(CaseScores.model_fields)
"""Kinds of prompt, in the order in which they are scored."""

Measure = Callable[[TargetScore, TargetScore], float]


def beats(wanted: TargetScore, other: TargetScore) -> float:
    """1 where the wanted target is the likelier one, else 0; a tie is no success."""
    if wanted.logprob is None or other.logprob is None:
        return 0.0
    return float(wanted.logprob > other.logprob)


def is_greedy(wanted: TargetScore, other: TargetScore) -> float:
    """1 where greedy decoding begins with the wanted target, else 0."""
    return float(wanted.greedy)


def margin(wanted: TargetScore, other: TargetScore) -> float:
    """P(wanted) − P(other), in −1 to 1; −1 where either is not finite."""
    here, there = wanted.probability, other.probability
    return -1.0 if here is None or there is None else here - there


MEASURES: dict[str, Measure] = {"": beats, "_argmax": is_greedy, "_magnitude": margin}
"""Suffix of a metric's name -> how one prompt is judged."""
WANTS_NEW = {"efficacy": "rewrite", "paraphrase": "paraphrase"}
WANTS_TRUE = {"neighborhood": "neighborhood", "distractor_neighborhood": "distractor_neighborhood"}


def _mean(scores: Sequence[PromptScore], measure: Measure, *, wants_new: bool) -> float | None:
    if not scores:
        return None
    pairs = [(s.new, s.true) if wants_new else (s.true, s.new) for s in scores]
    return fmean(measure(wanted, other) for wanted, other in pairs)


def case_metrics(scores: CaseScores) -> dict[str, float | None]:
    """Metric name -> mean over the case's prompts of that kind; None where it has none."""
    found: dict[str, float | None] = {}
    for suffix, measure in MEASURES.items():
        for name, kind in WANTS_NEW.items():
            found[name + suffix] = _mean(getattr(scores, kind), measure, wants_new=True)
        for name, kind in WANTS_TRUE.items():
            found[name + suffix] = _mean(getattr(scores, kind), measure, wants_new=False)
    return found


def failed_metrics(before: CaseScores) -> dict[str, float | None]:
    """Metrics of a case whose edit could not be solved: a failure to edit, which left everything else alone."""
    found = case_metrics(before)
    for suffix in MEASURES:
        for name in WANTS_NEW:
            if found[name + suffix] is not None:
                found[name + suffix] = -1.0 if suffix == "_magnitude" else 0.0
    return found


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean, 0 if any value is 0: the "score" of Meng et al. 2022 over three metrics."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)
