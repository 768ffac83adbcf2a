"""Risk by rehearsal: the solved update runs as a hook on prompts that an edit must not move; nothing is written.

The only stage that sees same-subject damage: the key is the same there, and the value does the harm. Blocks below the
edited layer run once for both sides; logits are computed at each prompt's last position only. Of very many requests,
each one's own prompt is rehearsed and the prompts around it for a sample of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.models.handle import preserved
from guardedit.records import EditRequest, ProbeChange, ProbePrompts, Scope, Score
from guardedit.risk.compare import Compared, compare
from guardedit.risk.context import RiskContext
from guardedit.risk.key_view import KeyView, views_of
from guardedit.risk.many import SURROUNDED, first_near, own_prompt, sample_requests, sampling_note, shared
from guardedit.risk.neighbours import Probes, ProbeSizes, first_tokens, noted, unfiltered_probes
from guardedit.risk.scores import Measured, ScoreRule, mean_with_interval, measure_all

SHOWN_PROBES = 8
"""Prompts a scope in the report, those that change most first; those of the target are all shown."""
SHOWN_NAMESAKES = 4
"""Of namesakes fewer: they say the same."""


@dataclass(frozen=True)
class RehearsalView:
    """A delta rehearsed on the prompts around its requests."""

    context: RiskContext
    views: tuple[KeyView, ...]
    delta: EditDelta

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """What the delta was solved for."""
        return tuple(view.request for view in self.views)

    @property
    def sampled(self) -> tuple[int, ...]:
        """Requests whose surroundings are rehearsed, by index."""
        return sample_requests(len(self.views), SURROUNDED, self.context.seed)

    @property
    def sizes(self) -> ProbeSizes:
        """Prompts around each sampled request: the sizes of the context, shared among them."""
        return shared(self.context.sizes, len(self.sampled))

    @cached_property
    def probes(self) -> tuple[Probes, ...]:
        """Prompts around each request; of those that are not sampled, the request's own prompt alone."""
        chosen = set(self.sampled)
        return tuple(
            self._around(view) if index in chosen else own_prompt(view.request)
            for index, view in enumerate(self.views)
        )

    def _around(self, view: KeyView) -> Probes:
        c, sizes = self.context, self.sizes
        near = view.near if len(self.views) == 1 else first_near(view.request, view.near, sizes.near)
        return unfiltered_probes(c.handle, view.request, sizes, c.seed, near)

    @cached_property
    def compared(self) -> tuple[tuple[Compared, ...], ...]:
        """Per request, its prompts before and rehearsed, without stems that ask for the edited relation."""
        handle = self.context.handle
        tagged = [(i, scope, text) for i, probes in enumerate(self.probes) for scope, text in _tagged(probes)]
        found = compare(
            handle, self.delta, [text for _, _, text in tagged], [scope for _, scope, _ in tagged]
        )
        by_request: list[list[Compared]] = [[] for _ in self.views]
        for (index, _, _), one in zip(tagged, found, strict=True):
            by_request[index].append(one)
        for index in self.sampled:
            request = self.requests[index]
            answers = first_tokens(handle, request)
            by_request[index] = without_own_relation(by_request[index], request, answers, self.sizes.subject)
        return tuple(tuple(own) for own in by_request)

    def of(self, scope: Scope) -> tuple[Compared, ...]:
        """Comparisons of one scope."""
        return tuple(one for own in self.compared for one in own if one.scope == scope)

    @cached_property
    def used(self) -> tuple[Probes, ...]:
        """The probes of each request as they were compared."""
        subjects = (tuple(one.prompt for one in own if one.scope == "subject") for own in self.compared)
        whole = zip(self.requests, self.probes, subjects, strict=True)
        return tuple(noted(request, replace(probes, subject=subject)) for request, probes, subject in whole)

    @cached_property
    def probabilities(self) -> dict[tuple[int, str], float]:
        """P(target | prompt) under the rehearsed delta, the product over its tokens, by request and target."""
        asked = [
            (index, target)
            for index, request in enumerate(self.requests)
            for target in (request.target_new, request.target_true)
            if target is not None
        ]
        handle, prompts = self.context.handle, [self.requests[index].asked for index, _ in asked]
        with rehearsed(handle, self.delta):
            found = handle.token_logprobs(prompts, [target for _, target in asked])
        return {one: float(logprobs.double().sum().exp()) for one, logprobs in zip(asked, found, strict=True)}


def _tagged(probes: Probes) -> Iterator[tuple[Scope, str]]:
    prompts = probes.prompts()
    groups: tuple[tuple[Scope, tuple[str, ...]], ...] = (
        ("target", prompts.target), ("subject", prompts.subject), ("near", prompts.near),
        ("namesake", prompts.namesake), ("entailed", prompts.entailed),
    )  # fmt: skip
    for scope, texts in groups:
        yield from ((scope, text) for text in texts)


def without_own_relation(
    found: Sequence[Compared], request: EditRequest, answers: frozenset[int], size: int
) -> list[Compared]:
    """Drop generated same-subject prompts that the unedited model answers with old or new target, then the spare."""
    named = {*request.elsewhere, *request.same_subject}
    subject = [
        one
        for one in found
        if one.scope == "subject" and (one.prompt in named or one.top_before not in answers)
    ]
    return [*(one for one in found if one.scope != "subject"), *subject[: max(size, len(named))]]


def _kl(view: RehearsalView, scope: Scope) -> Measured:
    return mean_with_interval([one.kl_nats for one in view.of(scope)], view.context.seed)


def _lost(view: RehearsalView, scope: Scope) -> Measured:
    return mean_with_interval(
        [float(one.top_before != one.top_after) for one in view.of(scope)], view.context.seed
    )


def rehearsed_subject_kl(view: RehearsalView) -> Measured:
    """Mean KL(before ‖ rehearsed) of the next token on same-subject, other-relation prompts.

    Nats, 0 upwards, 95 % bootstrap interval over prompts. By far the largest damage of single edits. Source: DESIGN.
    """
    return _kl(view, "subject")


def rehearsed_subject_lost_top1(view: RehearsalView) -> Measured:
    """Share of same-subject prompts whose most likely next token changes. 0 to 1, 95 % bootstrap interval."""
    return _lost(view, "subject")


def rehearsed_near_kl(view: RehearsalView) -> Measured:
    """Mean KL(before ‖ rehearsed) of the next token on prompts about other subjects. Nats, 0 upwards."""
    return _kl(view, "near")


def rehearsed_near_lost_top1(view: RehearsalView) -> Measured:
    """Share of prompts about other subjects whose most likely next token changes. 0 to 1."""
    return _lost(view, "near")


def rehearsed_namesake_kl(view: RehearsalView) -> Measured:
    """Mean KL(before ‖ rehearsed) of the next token on prompts about made-up namesakes. Nats, 0 upwards.

    Subjects that end in the same word, which near damage falls on (docs/evidence.md).
    """
    return _kl(view, "namesake")


def rehearsed_namesake_lost_top1(view: RehearsalView) -> Measured:
    """Share of prompts about made-up namesakes whose most likely next token changes. 0 to 1."""
    return _lost(view, "namesake")


def rehearsed_entailed_kl(view: RehearsalView) -> Measured:
    """Mean KL(before ‖ rehearsed) on entailed prompts: may rightly be large. Nats, 0 upwards. Source: RippleEdits."""
    return _kl(view, "entailed")


def rehearsed_p_new(view: RehearsalView) -> Measured:
    """P(new target | prompt) rehearsed, the product over its tokens; the lowest of several requests. 0 to 1."""
    values = [view.probabilities[index, request.target_new] for index, request in enumerate(view.requests)]
    return _extreme(min, values)


def rehearsed_p_old(view: RehearsalView) -> Measured:
    """P(old target | prompt) rehearsed; the highest of several requests. 0 to 1.

    Where no old target is named, the probability of the model's old most likely next token.
    """
    values = []
    for index, request in enumerate(view.requests):
        if request.target_true is not None:
            values.append(view.probabilities[index, request.target_true])
        else:
            values += [one.p_after for one in view.compared[index] if one.prompt == request.asked]
    return _extreme(max, values)


def _extreme(pick: Callable[[list[float]], float], values: list[float]) -> Measured:
    """The worst of several; min and max of Python pass over a NaN, which must not be passed over."""
    return Measured(pick(values) if all(map(math.isfinite, values)) else math.nan, len(values))


REHEARSAL_SCORES: dict[str, ScoreRule[RehearsalView]] = {
    "rehearsed_subject_kl": ScoreRule(rehearsed_subject_kl, "rehearsal", "subject", "nats"),
    "rehearsed_subject_lost_top1": ScoreRule(rehearsed_subject_lost_top1, "rehearsal", "subject", "share"),
    "rehearsed_near_kl": ScoreRule(rehearsed_near_kl, "rehearsal", "near", "nats"),
    "rehearsed_near_lost_top1": ScoreRule(rehearsed_near_lost_top1, "rehearsal", "near", "share"),
    "rehearsed_namesake_kl": ScoreRule(rehearsed_namesake_kl, "rehearsal", "namesake", "nats"),
    "rehearsed_namesake_lost_top1": ScoreRule(rehearsed_namesake_lost_top1, "rehearsal", "namesake", "share"),
    "rehearsed_entailed_kl": ScoreRule(rehearsed_entailed_kl, "rehearsal", "entailed", "nats"),
    "rehearsed_p_new": ScoreRule(rehearsed_p_new, "rehearsal", "target", "probability", worst="min"),
    "rehearsed_p_old": ScoreRule(rehearsed_p_old, "rehearsal", "target", "probability"),
}


@dataclass(frozen=True)
class RehearsalRisk:
    """The third stage's outcome."""

    scores: tuple[Score, ...]
    probes: tuple[ProbeChange, ...]
    """Prompts a person can check with their own eyes, by scope, those that change most first."""
    prompts: tuple[ProbePrompts, ...]
    """All prompts, a record per request."""
    notes: tuple[str, ...]


def rehearse(context: RiskContext, requests: Sequence[EditRequest], delta: EditDelta) -> RehearsalRisk:
    """Run the delta as a hook on the prompts of every scope; the model is left as it was."""
    with preserved(context.handle):
        return rehearsal_risk(RehearsalView(context, views_of(context, requests), delta))


def rehearsal_risk(view: RehearsalView) -> RehearsalRisk:
    """As `rehearse`, for a view that is there already, inside `preserved`."""
    scores = measure_all(REHEARSAL_SCORES, view, view.context.seed)
    if any(score.value is not None for score in scores):
        return RehearsalRisk(scores, _shown(view), tuple(one.prompts() for one in view.used), _notes(view))
    return RehearsalRisk(scores, (), (), ())


def _notes(view: RehearsalView) -> tuple[str, ...]:
    """How the prompts came about; with many requests, whose they are."""
    if len(view.views) == 1:
        return tuple(one.note for one in view.used)
    told = [f"{view.requests[index].subject}: {view.used[index].note}" for index in view.sampled]
    return (*sampling_note(len(view.views), len(view.sampled), view.context.seed), *told)


def _shown(view: RehearsalView) -> tuple[ProbeChange, ...]:
    scopes: tuple[Scope, ...] = ("target", "subject", "near", "namesake", "entailed")
    return tuple(change for scope in scopes for change in _shown_of(view, scope))


def _shown_of(view: RehearsalView, scope: Scope) -> list[ProbeChange]:
    found = list(view.of(scope))
    if scope != "target":
        shown = SHOWN_NAMESAKES if scope == "namesake" else SHOWN_PROBES
        found = sorted(found, key=lambda one: -one.kl_nats)[:shown]
    decode = view.context.handle.tokenizer.decode
    return [
        ProbeChange(
            scope=one.scope,
            prompt=one.prompt,
            before=str(decode([one.top_before])),
            after=str(decode([one.top_after])),
            p_before=one.p_before,
            p_after=one.p_after,
            kl_nats=one.kl_nats,
        )
        for one in found
    ]
