"""How firmly the model holds what an edit would overwrite: its old answer over several wordings, not over one."""

from __future__ import annotations

import math

from guardedit.edits.rewordings import rewordings
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest
from guardedit.risk.key_view import KeyView
from guardedit.risk.scores import Measured

FRAMES = ("Everyone knows that {}", "It is true that {}")
"""Openings behind which a general truth is said as before, while a guess at a name often is not."""


def held_wordings(request: EditRequest) -> tuple[str, ...]:
    """Complete prompts that ask for the old answer: the prompt, named paraphrases, rewordings by rule, two frames."""
    made = (*rewordings(request.prompt), *(_framed(frame, request.prompt) for frame in FRAMES))
    filled = (text.replace("{}", request.subject) for text in made)
    return tuple(dict.fromkeys((request.filled, *request.paraphrases, *filled)))


def _framed(frame: str, prompt: str) -> str:
    """The prompt inside a frame, its first word in small letters unless it is the subject or a name in capitals."""
    first = prompt.split(" ", 1)[0]
    lowered = prompt[0].lower() + prompt[1:] if first.istitle() else prompt
    return frame.replace("{}", lowered)


def overwritten_belief(view: KeyView) -> Measured:
    """exp(mean over wordings of log P(old target)): how firmly the model holds the answer that is to be overwritten.

    Probability, 0 to 1. The wordings are the prompt, named paraphrases, rewordings by rule and two frames; log P is
    summed over the target's tokens. 0 where the request has a context: there nothing is overwritten. Where no old
    target is named, the model's own most likely next token stands for it. docs/conflict.md says what it tells apart.
    """
    request = view.request
    if request.context is not None:
        return Measured(
            0.0, 1, reason=f"holds in its context only ({request.context}): nothing is overwritten"
        )
    old = request.target_true
    told = None
    if old is None:
        old, _ = view.own_answer
        told = f"target_true is not named; the model's own answer is {old!r}"
    found = held_logprobs(view.context.handle, request, old)
    return Measured(math.exp(sum(found) / len(found)), len(found), reason=told)


def held_logprobs(handle: ModelHandle, request: EditRequest, old: str) -> tuple[float, ...]:
    """log P(old | wording) in nats of every wording, summed over the tokens of `old`; the bare prompt comes first."""
    prompts = held_wordings(request)
    found = handle.token_logprobs(prompts, [old] * len(prompts))
    return tuple(float(row.double().sum()) for row in found)
