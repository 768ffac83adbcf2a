"""Subjects like an edit's own, proposed by the model itself: for relations that no table knows."""

from __future__ import annotations

from collections.abc import Sequence

from guardedit.models.corpus import sample_texts
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest
from guardedit.risk.stems import article_of

LISTS = 8
"""Lists that a single request is asked for: many short ones, as a step costs the same for one row and for eight."""
_LIST_TOKENS = 12
_ROWS_AT_ONCE = 64


def _asked(request: EditRequest) -> str:
    return f"Some well-known examples are: {request.subject},"


def proposals(handle: ModelHandle, requests: Sequence[EditRequest], lists: int, seed: int) -> list[list[str]]:
    """Per request, names that the model lists after the subject, in order, without doubles."""
    prompts = [_asked(request) for request in requests for _ in range(lists)]
    if not prompts:
        return []
    texts = sample_texts(
        handle, len(prompts), _LIST_TOKENS, seed, prompts, temperature=0.7, batch_size=_ROWS_AT_ONCE
    )
    groups = [texts[start : start + lists] for start in range(0, len(texts), lists)]
    return [_names(request, group) for request, group in zip(requests, groups, strict=True)]


def _names(request: EditRequest, texts: Sequence[str]) -> list[str]:
    prompt = _asked(request)
    lists = [text.removeprefix(prompt).split("\n")[0].split(",")[:-1] for text in texts]
    names = [name.strip(" .\n\t\"'") for names in lists for name in names]
    names = [name.removeprefix("and ").removeprefix(article_of(request)) for name in names]
    good = [n for n in names if n and len(n.split()) <= 5 and n.isprintable() and "{" not in n]
    own = request.subject.casefold()
    return [name for name in dict.fromkeys(good) if name.casefold() not in own and own not in name.casefold()]
