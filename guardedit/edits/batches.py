"""Which requests can be solved together: not two that ask the same, and not two that a layer cannot tell apart."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations

from guardedit.edits.keys import Key
from guardedit.errors import BadRequestError
from guardedit.records import EditRequest

SAME_KEY = 1e-4
"""Keys that differ by less, relative to the larger, are one key: float32 and another padding give some 1e-6."""


def require_consistent(requests: Sequence[EditRequest]) -> None:
    """Raise BadRequestError for no requests, and for two that ask the same question, whatever they answer.

    The same question is the same text with its subject filled in, white space apart. Two targets for it contradict
    each other; the same target twice would count as two facts.
    """
    if not requests:
        raise BadRequestError("no request to solve; give at least one")
    for first, second in _pairs([" ".join(request.filled.split()) for request in requests]):
        one, other = requests[first], requests[second]
        if one.target_new.strip() != other.target_new.strip():
            raise BadRequestError(
                f"{_named(requests, first)} and {_named(requests, second)} contradict each other; keep one of the two"
            )
        raise BadRequestError(
            f"{_named(requests, second)} repeats {_named(requests, first)}; leave one of the two out"
        )


def require_distinct_keys(requests: Sequence[EditRequest], keys: Sequence[Key], layer: int) -> None:
    """Raise BadRequestError where two requests have one key at `layer`: it cannot be given two values.

    A key depends on the text up to the subject's last token alone, so it takes the same subject behind the same text.
    """
    for first, second in _pairs([_head(request) for request in requests]):
        one, other = keys[first].k_star, keys[second].k_star
        if float((one - other).norm()) <= SAME_KEY * max(float(one.norm()), float(other.norm())):
            raise BadRequestError(
                f"{_named(requests, first)} and {_named(requests, second)} are the same text up to the subject's end, "
                f"so layer {layer} sees one key and cannot give it two values. Plan them one after another, or put "
                "other words before the subject in one of them"
            )


def _head(request: EditRequest) -> str:
    return request.prompt[: request.prompt.index("{}")] + request.subject


def _pairs(texts: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Indices of equal entries, two at a time, in order."""
    groups: dict[Hashable, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text, []).append(index)
    for members in groups.values():
        yield from combinations(members, 2)


def _named(requests: Sequence[EditRequest], index: int) -> str:
    request = requests[index]
    return f"request {index + 1} ({request.filled!r} -> {request.target_new.strip()!r})"
