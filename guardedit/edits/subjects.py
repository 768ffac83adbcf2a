"""A subject's tokens, as they come in prompts."""

from __future__ import annotations

from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import tokenise
from guardedit.records import EditRequest

AROUND = ("{}", "So {}", '"{}"', "({})")
"""Where a subject may stand: at the start, behind a space, behind a mark. Its capitals stay as they are."""


def subject_sequences(handle: ModelHandle, request: EditRequest) -> tuple[tuple[int, ...], ...]:
    """Every sequence of token ids that the subject has at the start of a text, in its midst, and in its own prompt."""
    texts = (request.prompt, *AROUND)
    found = [
        tokens_over(handle, text.replace("{}", request.subject), text.index("{}"), request.subject)
        for text in texts
    ]
    return tuple(dict.fromkeys(found))


def tokens_over(handle: ModelHandle, text: str, start: int, subject: str) -> tuple[int, ...]:
    """Ids of the tokens of `text` that overlap the subject, which begins at character `start`."""
    tokens, end = tokenise(handle, text), start + len(subject)
    return tuple(
        token
        for token, (left, right) in zip(tokens.ids, tokens.offsets, strict=True)
        if left < end and right > start
    )
