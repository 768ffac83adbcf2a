"""Texts about a subject in the model's own words: what a guarded value keeps while one fact changes.

The published loss defends the subject with a single prompt ("{subject} is a"). Here the model continues several
openings about the subject; texts that speak of the edited relation, by naming the old or the new target, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardedit.models.corpus import sample_texts
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

OPENINGS = (
    "Those who study {}",
    "It is true that {} is",
    "We talked about {} and",
    "Compared with others, {} has",
    "An introduction to {}:",
    "Some say that {} was",
    "There is more than one way to see {}, which",
    "After reading about {}, she",
    "On the first page we meet {}, who or which",
    "Question: what is {}? Answer: it",
)
"""None begins with the subject: at position 0 its key is unlike any other. Probes of risk and drift use other stems."""
TEMPERATURE = 0.7


def essence_texts(
    handle: ModelHandle, requests: Sequence[EditRequest], count: int, length: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """Up to `count` texts for each request, continued by the model for `length` tokens; the same for the same seed.

    Fewer where all but a few speak of the edited relation; none where every one does.
    """
    openings = [_about(opening, request) for request in requests for opening in OPENINGS[:count]]
    texts = sample_texts(
        handle, len(openings), length, seed, openings, temperature=TEMPERATURE, batch_size=64
    )
    size = len(OPENINGS[:count])
    found = []
    for number, request in enumerate(requests):
        own = texts[number * size : (number + 1) * size]
        found.append(tuple(dict.fromkeys(_stripped(t) for t in own if not _speaks_of(t, request))))
    return tuple(found)


def _about(opening: str, request: EditRequest) -> str:
    """The opening with the subject, and the article that the request's own prompt has before it."""
    before = request.prompt[: request.prompt.index("{}")].lower().split(" ")
    article = (
        before[-2] + " " if len(before) > 1 and before[-1] == "" and before[-2] in ("the", "a", "an") else ""
    )
    return opening.replace("{}", article + request.subject)


def _speaks_of(text: str, request: EditRequest) -> bool:
    """Whether a target stands in what was said about the subject (it may stand in the subject's own name)."""
    said = text.replace(request.subject, "").casefold()
    targets = [target for target in (request.target_new, request.target_true) if target is not None]
    return any(target.strip().casefold() in said for target in targets)


def _stripped(text: str) -> str:
    return text.rstrip()
