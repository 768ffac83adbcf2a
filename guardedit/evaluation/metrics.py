"""Metrics of one case, before or after its edit. Definitions: Meng et al. 2022, appendix B.1, unless it says otherwise.

P(o) is the geometric mean probability of the tokens of target o. `efficacy` is the share of P(new) > P(true) at the
edited prompt, `paraphrase` the same at other wordings, `attribute` the same at subjects whose true answer is the new
target, `neighborhood` the share of P(true) > P(new) at other subjects, `distractor_neighborhood` that with the edited
fact stated before (CounterFact+). The end of a metric's name says how an answer was judged: see `PROTOCOLS`.

A probability that is not finite never counts as a success, whichever side it would favour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from guardedit.evaluation.cases import FOLLOWS, HOLDS, WORDINGS
from guardedit.evaluation.scoring import TargetScore
from guardedit.records import Record


class PromptScore(Record):
    """Both targets after one prompt."""

    new: TargetScore
    true: TargetScore


class QuestionScore(Record):
    """One question with an answer of its own."""

    group: str
    exact: bool | None
    """Teacher-forced: every token of one of its answers is the likeliest; None where it has no answer."""
    matched: float | None
    """Teacher-forced: share of the first answer's tokens that are the likeliest."""
    generated: bool | None = None
    """Greedy text after the prompt holds one of its answers; None where none was generated."""


class Move(Record):
    """What became of one prompt's next-token distribution, against the unedited model."""

    kl_nats: float | None
    """KL(unedited ‖ edited) over the whole vocabulary; None where it is not finite."""
    lost: bool
    """The likeliest token is another one."""


class CaseScores(Record):
    """One case on one side of its edit."""

    rewrite: tuple[PromptScore, ...]
    paraphrase: tuple[PromptScore, ...] = ()
    neighborhood: tuple[PromptScore, ...] = ()
    distractor_neighborhood: tuple[PromptScore, ...] = ()
    attribute: tuple[PromptScore, ...] = ()
    questions: tuple[QuestionScore, ...] = ()
    moves: dict[str, tuple[Move, ...]] = {}
    """By kind of prompt; on the edited side only."""
    said: dict[str, tuple[bool, ...]] = {}
    """By kind of prompt: whether greedy text after it holds the new target."""
    fluency: float | None = None
    consistency: float | None = None
    texts: tuple[str, ...] = ()
    """What `fluency` was read from."""


KINDS = ("rewrite", "paraphrase", "neighborhood", "distractor_neighborhood", "attribute")
"""Kinds of prompt with both targets, in the order in which they are scored."""

Measure = Callable[[TargetScore, TargetScore], float | None]


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


def token_match(wanted: TargetScore, other: TargetScore) -> float | None:
    """Share of the target's tokens that are the likeliest, teacher-forced: zsRE's accuracy (Mitchell et al. 2022)."""
    return wanted.matched


TOKENS = "_token_match_teacher_forced"
GENERATED = "_generated"
MEASURES: dict[str, Measure] = {
    "": beats, "_argmax": is_greedy, "_magnitude": margin, TOKENS: token_match,
}  # fmt: skip
"""Suffix of a metric's name -> how one prompt is judged."""
WANTS_NEW = {"efficacy": "rewrite", "paraphrase": "paraphrase", "attribute": "attribute"}
WANTS_TRUE = {"neighborhood": "neighborhood", "distractor_neighborhood": "distractor_neighborhood"}
EDITED = ("efficacy", "paraphrase")
"""Metrics that say whether the edit took; the others say what else it did."""

PROTOCOLS = {
    "": "P(wanted) > P(other), teacher-forced; questions, which have one answer: exact match, teacher-forced",
    "_argmax": "exact match, teacher-forced: every token of the wanted target is the likeliest one",
    "_magnitude": "P(wanted) − P(other), teacher-forced",
    TOKENS: "share of the target's tokens that are the likeliest one, teacher-forced",
    GENERATED: "greedy text of 16 tokens holds the target's words in a row",
    "_kl_nats": "KL(unedited || edited) of the next token, whole vocabulary, summed over it",
    "_lost_top1": "share of prompts whose likeliest next token is another one than before",
    "fluency": "n-gram entropy of texts of 100 tokens (top-5 sampling, seeded), hundredths of a bit",
    "consistency": "TF-IDF cosine of these texts with the record's reference texts",
}
"""End of a metric's name, or the whole of it -> how it was measured."""


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean; None for no values or where any is missing."""
    known = list(values)
    return fmean([v for v in known if v is not None]) if known and None not in known else None


def _pairs(scores: Sequence[PromptScore], measure: Measure, *, wants_new: bool) -> float | None:
    pairs = [(s.new, s.true) if wants_new else (s.true, s.new) for s in scores]
    return _mean(measure(wanted, other) for wanted, other in pairs)


def case_metrics(scores: CaseScores) -> dict[str, float | None]:
    """Metric name -> mean over the case's prompts of that kind; None where it has none."""
    found: dict[str, float | None] = {}
    for suffix, measure in MEASURES.items():
        for name, kind in WANTS_NEW.items():
            found[name + suffix] = _pairs(getattr(scores, kind), measure, wants_new=True)
        for name, kind in WANTS_TRUE.items():
            found[name + suffix] = _pairs(getattr(scores, kind), measure, wants_new=False)
    for name in EDITED:
        found[name + GENERATED] = _mean(map(float, scores.said.get(WANTS_NEW[name], ())))
    return {**found, **_question_metrics(scores), **_move_metrics(scores), **_text_metrics(scores)}


def _question_metrics(scores: CaseScores) -> dict[str, float | None]:
    """Every group that the case has, and the two families of groups, question by question."""
    found: dict[str, float | None] = {}
    groups = {group: (group,) for group in dict.fromkeys(q.group for q in scores.questions)}
    for name, members in {"portability": FOLLOWS, "locality": HOLDS, **groups}.items():
        asked = [q for q in scores.questions if q.group in members and q.exact is not None]
        if not asked:
            continue
        found[name] = _mean(_answered(asked, [float(bool(q.exact)) for q in asked]))
        found[name + TOKENS] = _mean(_answered(asked, [q.matched for q in asked]))
        said = [None if q.generated is None else float(q.generated) for q in asked]
        found[name + GENERATED] = _mean(_answered(asked, said))
    return found


def _answered(asked: Sequence[QuestionScore], values: Sequence[float | None]) -> list[float | None]:
    """One value a question: wordings of one question count once, as their best."""
    single = [v for q, v in zip(asked, values, strict=True) if q.group not in WORDINGS]
    for group in WORDINGS:
        best = [v for q, v in zip(asked, values, strict=True) if q.group == group]
        known = [v for v in best if v is not None]
        single += [max(known) if known else None] if best else []
    return single


def _move_metrics(scores: CaseScores) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for kind, moves in scores.moves.items():
        found[f"{kind}_kl_nats"] = _mean(move.kl_nats for move in moves)
        found[f"{kind}_lost_top1"] = _mean(float(move.lost) for move in moves)
    return found


def _text_metrics(scores: CaseScores) -> dict[str, float | None]:
    if not scores.texts:
        return {}
    found = {"fluency": scores.fluency}
    return found if scores.consistency is None else {**found, "consistency": scores.consistency}


def failed_metrics(scores: CaseScores) -> dict[str, float | None]:
    """Metrics of a case whose edit could not be solved: a failure to edit, whatever the scores say."""
    found = case_metrics(scores)
    for suffix in (*MEASURES, GENERATED):
        for name in EDITED:
            if found[name + suffix] is not None:
                found[name + suffix] = -1.0 if suffix == "_magnitude" else 0.0
    return found


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean, 0 if any value is 0: the "score" of Meng et al. 2022 over three metrics."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)
