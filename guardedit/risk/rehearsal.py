"""Risk by rehearsal: the solved update runs as a hook on prompts that an edit must not move; nothing is written.

The only stage that sees same-subject damage: the key is the same there, and the value does the harm. Blocks below the
edited layer run once for both sides; logits are computed at each prompt's last position only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import record, resume
from guardedit.records import EditRequest, ProbeChange, ProbePrompts, Scope, Score
from guardedit.risk.context import RiskContext
from guardedit.risk.neighbours import Probes, ProbeSizes, first_tokens, noted, unfiltered_probes
from guardedit.risk.scores import Measured, ScoreRule, mean_with_interval, measure_all

BATCH = 16
"""Prompts a forward pass, sorted by length."""
SHOWN_PROBES = 8
"""Prompts a scope in the report, those that change most first; those of the target are all shown."""


@dataclass(frozen=True)
class Compared:
    """One prompt's next-token distribution, before and rehearsed."""

    scope: Scope
    prompt: str
    top_before: int
    top_after: int
    p_before: float
    """Of the old top token."""
    p_after: float
    """Of the same token."""
    kl_nats: float
    """KL(before ‖ rehearsed)."""


@dataclass(frozen=True)
class RehearsalView:
    """A delta rehearsed on the prompts around its requests."""

    context: RiskContext
    requests: tuple[EditRequest, ...]
    delta: EditDelta

    @cached_property
    def probes(self) -> tuple[Probes, ...]:
        """Prompts around each request; the sizes of the context are shared among the requests."""
        c, sizes = self.context, shared(self.context.sizes, len(self.requests))
        return tuple(unfiltered_probes(c.handle, request, sizes, c.seed) for request in self.requests)

    @cached_property
    def compared(self) -> tuple[tuple[Compared, ...], ...]:
        """Per request, its prompts before and rehearsed, without stems that ask for the edited relation."""
        handle = self.context.handle
        tagged = [(i, scope, text) for i, probes in enumerate(self.probes) for scope, text in _tagged(probes)]
        found = compare(
            handle, self.delta, [text for _, _, text in tagged], [scope for _, scope, _ in tagged]
        )
        answers = [first_tokens(handle, request) for request in self.requests]
        size = shared(self.context.sizes, len(self.requests)).subject
        kept: list[tuple[Compared, ...]] = []
        for index, request in enumerate(self.requests):
            own = [one for (i, _, _), one in zip(tagged, found, strict=True) if i == index]
            kept.append(_without_own_relation(own, request, answers[index], size))
        return tuple(kept)

    def of(self, scope: Scope) -> tuple[Compared, ...]:
        """Comparisons of one scope."""
        return tuple(one for own in self.compared for one in own if one.scope == scope)

    @cached_property
    def used(self) -> tuple[Probes, ...]:
        """The probes of each request as they were compared."""
        subjects = (tuple(one.prompt for one in own if one.scope == "subject") for own in self.compared)
        whole = zip(self.requests, self.probes, subjects, strict=True)
        return tuple(noted(request, replace(probes, subject=subject)) for request, probes, subject in whole)

    def probability(self, target: str, request: EditRequest) -> float:
        """P(target | prompt) under the rehearsed delta: the product over its tokens."""
        handle = self.context.handle
        with rehearsed(handle, self.delta):
            (logprobs,) = handle.token_logprobs([request.filled], [target])
        return float(logprobs.double().sum().exp())


def shared(sizes: ProbeSizes, n_requests: int) -> ProbeSizes:
    """Sizes for one of `n_requests`: the numbers divided, but two prompts a scope at least."""
    return ProbeSizes(**{name: max(2, -(-size // n_requests)) for name, size in vars(sizes).items()})


def _tagged(probes: Probes) -> Iterator[tuple[Scope, str]]:
    prompts = probes.prompts()
    groups: tuple[tuple[Scope, tuple[str, ...]], ...] = (
        ("target", prompts.target), ("subject", prompts.subject), ("near", prompts.near),
        ("entailed", prompts.entailed),
    )  # fmt: skip
    for scope, texts in groups:
        yield from ((scope, text) for text in texts)


def _without_own_relation(
    found: Sequence[Compared], request: EditRequest, answers: frozenset[int], size: int
) -> tuple[Compared, ...]:
    """Drop generated same-subject prompts that the unedited model answers with old or new target, then the spare."""
    named = set(request.same_subject)
    subject = [
        one
        for one in found
        if one.scope == "subject" and (one.prompt in named or one.top_before not in answers)
    ]
    return (*(one for one in found if one.scope != "subject"), *subject[: max(size, len(named))])


@torch.no_grad()
def compare(
    handle: ModelHandle, delta: EditDelta, prompts: Sequence[str], scopes: Sequence[Scope]
) -> list[Compared]:
    """Each prompt's last position before and under the rehearsed delta, in the order given. Nothing is written."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    found: dict[int, Compared] = {}
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        before, after = _both_sides(handle, delta, [prompts[i] for i in chunk])
        if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise FloatingPointError("a next-token distribution came out as NaN or infinite")
        for row, index in enumerate(chunk):
            found[index] = _compared(before[row], after[row], scopes[index], prompts[index])
    return [found[index] for index in range(len(prompts))]


def _both_sides(
    handle: ModelHandle, delta: EditDelta, prompts: Sequence[str]
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n vocab"]]:
    """Log-probabilities (nats, float64) at the last position, before and rehearsed."""
    batch = handle.encode(prompts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lowest = min(delta.layers)
    name = f"blocks.{lowest}.hook_resid_pre"
    with record(handle, [name]) as seen:
        before = _last_logprobs(handle, ids, mask)
    with ExitStack() as stack:
        stack.enter_context(resume(handle, lowest, seen[name]))
        stack.enter_context(rehearsed(handle, delta))
        after = _last_logprobs(handle, ids, mask)
    return before, after


def _last_logprobs(
    handle: ModelHandle, ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch vocab"]:
    real = mask.bool()
    last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
    return handle.logits_at(handle.hidden(ids, mask), last).double().log_softmax(-1)


def _compared(
    before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"], scope: Scope, prompt: str
) -> Compared:
    top = int(before.argmax())
    return Compared(
        scope=scope,
        prompt=prompt,
        top_before=top,
        top_after=int(after.argmax()),
        p_before=float(before[top].exp()),
        p_after=float(after[top].exp()),
        # Rounding can take the KL of nearly equal distributions below its bound.
        kl_nats=max(0.0, float((before.exp() * (before - after)).sum())),
    )


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


def rehearsed_entailed_kl(view: RehearsalView) -> Measured:
    """Mean KL(before ‖ rehearsed) on entailed prompts: may rightly be large. Nats, 0 upwards. Source: RippleEdits."""
    return _kl(view, "entailed")


def rehearsed_p_new(view: RehearsalView) -> Measured:
    """P(new target | prompt) rehearsed, the product over its tokens; the lowest of several requests. 0 to 1."""
    values = [view.probability(request.target_new, request) for request in view.requests]
    return Measured(min(values), len(values))


def rehearsed_p_old(view: RehearsalView) -> Measured:
    """P(old target | prompt) rehearsed; the highest of several requests. 0 to 1.

    Where no old target is named, the probability of the model's old most likely next token.
    """
    values = []
    for request in view.requests:
        if request.target_true is not None:
            values.append(view.probability(request.target_true, request))
        else:
            values += [one.p_after for one in view.of("target") if one.prompt == request.filled]
    return Measured(max(values), len(values))


REHEARSAL_SCORES: dict[str, ScoreRule[RehearsalView]] = {
    "rehearsed_subject_kl": ScoreRule(rehearsed_subject_kl, "rehearsal", "subject", "nats"),
    "rehearsed_subject_lost_top1": ScoreRule(rehearsed_subject_lost_top1, "rehearsal", "subject", "share"),
    "rehearsed_near_kl": ScoreRule(rehearsed_near_kl, "rehearsal", "near", "nats"),
    "rehearsed_near_lost_top1": ScoreRule(rehearsed_near_lost_top1, "rehearsal", "near", "share"),
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
    """Run the delta as a hook on same-subject, near, entailed and target prompts; the model is left as it was."""
    with preserved(context.handle):
        return rehearsal_risk(RehearsalView(context, tuple(requests), delta))


def rehearsal_risk(view: RehearsalView) -> RehearsalRisk:
    """As `rehearse`, for a view that is there already, inside `preserved`."""
    scores = measure_all(REHEARSAL_SCORES, view, view.context.seed)
    if any(score.value is not None for score in scores):
        prompts, notes = tuple(one.prompts() for one in view.used), tuple(one.note for one in view.used)
        return RehearsalRisk(scores, _shown(view), prompts, notes)
    return RehearsalRisk(scores, (), (), ())


def _shown(view: RehearsalView) -> tuple[ProbeChange, ...]:
    scopes: tuple[Scope, ...] = ("target", "subject", "near", "entailed")
    return tuple(change for scope in scopes for change in _shown_of(view, scope))


def _shown_of(view: RehearsalView, scope: Scope) -> list[ProbeChange]:
    found = list(view.of(scope))
    if scope != "target":
        found = sorted(found, key=lambda one: -one.kl_nats)[:SHOWN_PROBES]
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
