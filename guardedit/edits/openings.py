"""Openings about a subject that ask for none of its relations by name: what a guarded value keeps the answers to."""

from __future__ import annotations

from guardedit.records import EditRequest

OPENINGS = (
    "The word {} refers to a",
    "We learn that {} has",
    "Nobody remembers {} without",
    "Pictures of {}, taken in",
    "Without {}, there would be no",
    "It all started when {} was",
    "A museum about {} would show",
    "The biggest problem with {} is",
    "Critics of {} argue that",
    "In those years, {} was",
    "The price of {} is",
    "The teacher explained that {} has many",
)
"""None begins with the subject: at position 0 its key is unlike any other. Probes of risk and drift use other stems."""


def about(opening: str, request: EditRequest) -> tuple[str, int]:
    """The opening filled in, with the article that the request's own prompt has before the subject; and the character
    at which the subject begins."""
    before = request.prompt[: request.prompt.index("{}")].lower().split(" ")
    has_article = len(before) > 1 and before[-1] == "" and before[-2] in ("the", "a", "an")
    article = f"{before[-2]} " if has_article else ""
    return opening.replace("{}", article + request.subject), opening.index("{}") + len(article)
