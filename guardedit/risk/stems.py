"""Stems about a subject: filled in, put behind a neutral opening, in the order in which they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from guardedit.records import EditRequest
from guardedit.risk.relations import similarity, stems

SAME_WORDING = 0.5
"""A stem that shares this much of the request's content words asks for the edited relation."""


def stem_rounds(request: EditRequest) -> list[list[str]]:
    """Per stem, its variants about the subject; without stems worded like the request."""
    article, prefixes = article_of(request), stems()["prefixes"]
    texts = [stem for stem in stems()["subject"] if similarity(stem, request.prompt) < SAME_WORDING]
    return [_variants(stem, request.subject, article, _rotated(prefixes, i)) for i, stem in enumerate(texts)]


def turns(rounds: list[list[str]]) -> Iterator[str]:
    """All stems in their first form before any in its second."""
    return chain.from_iterable(zip(*rounds, strict=True))


def _variants(stem: str, subject: str, article: str, prefixes: Sequence[str]) -> list[str]:
    """The stem bare and behind each prefix.

    A stem that begins with its subject comes bare last: without a token before it, the subject's key would be that of
    position 0, which is like no other.
    """
    bare = fill(stem, subject, article, "")
    prefixed = [fill(stem, subject, article, prefix) for prefix in prefixes]
    return [*prefixed, bare] if stem.startswith("{}") else [bare, *prefixed]


def _rotated(prefixes: Sequence[str], by: int) -> list[str]:
    by %= len(prefixes)
    return [*prefixes[by:], *prefixes[:by]]


def article_of(request: EditRequest) -> str:
    """ "the ", "a " or "an " where the request's prompt has one right before its subject, else ""."""
    before = request.prompt[: request.prompt.index("{}")].lower().split(" ")
    stands = len(before) >= 2 and before[-1] == "" and before[-2] in ("the", "a", "an")
    return f"{before[-2]} " if stands else ""


def fill(stem: str, subject: str, article: str, prefix: str) -> str:
    """The stem about article + subject, behind a prefix, with the first letter as English wants it."""
    text = stem.replace("{}", article + subject)
    if not prefix:
        return text if stem.startswith("{}") and not article else text[0].upper() + text[1:]
    return behind(prefix, text, subject)


def behind(prefix: str, text: str, subject: str) -> str:
    """`text` moved into the middle of a sentence."""
    return prefix + (text if text.startswith((subject, "I ")) else text[0].lower() + text[1:])
