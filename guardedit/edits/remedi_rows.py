"""The rows that REMEDI is trained on: a fact's prompt, its other wordings, and openings about the subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guardedit.edits.keys import last_token_of
from guardedit.edits.openings import OPENINGS, about
from guardedit.edits.pushed_rows import PushedRow
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import tokenise
from guardedit.records import EditRequest


@dataclass(frozen=True)
class RowSettings:
    """Which rows a fact gives, beside its prompt and its paraphrases."""

    prefixes: tuple[str, ...] = ()
    """Sentences put before the prompt, one a fact, in turn."""
    openings: int = 0
    """Openings about the subject, a fact, whose next tokens shall stay."""


def rows_of(
    handle: ModelHandle, requests: Sequence[EditRequest], settings: RowSettings
) -> tuple[PushedRow, ...]:
    """Rows of all facts; row.fact is the request's index.

    Paraphrases that do not name the subject as it stands are left out: nothing is pushed in them. Raises
    BadRequestError for a request without an old target.
    """
    rows: list[PushedRow] = []
    for fact, request in enumerate(requests):
        rows += [_target_row(handle, fact, request, *text) for text in _wordings(request, fact, settings)]
        rows += [_opening_row(handle, fact, request, opening) for opening in _openings(fact, settings)]
    return tuple(rows)


def wordings(request: EditRequest) -> tuple[tuple[str, int], ...]:
    """(prompt, character at which the subject starts) of the bare prompt and each paraphrase that names the subject."""
    named = [(text, text.rfind(request.subject)) for text in request.paraphrases]
    return ((request.filled, request.prompt.index("{}")), *(pair for pair in named if pair[1] >= 0))


def _wordings(request: EditRequest, fact: int, settings: RowSettings) -> Iterator[tuple[str, int]]:
    texts = wordings(request)
    yield from texts
    if settings.prefixes:
        prefix = settings.prefixes[fact % len(settings.prefixes)]
        yield prefix + texts[0][0], len(prefix) + texts[0][1]


def _openings(fact: int, settings: RowSettings) -> tuple[str, ...]:
    first = fact * settings.openings
    return tuple(OPENINGS[(first + i) % len(OPENINGS)] for i in range(settings.openings))


def pair_row(
    handle: ModelHandle, fact: int, request: EditRequest, prompt: str, start: int, target: str
) -> PushedRow:
    """The row of a prompt with one target behind it; `start` is the subject's first character."""
    pair = handle.encode_pairs([prompt], [target])
    span = (start, start + len(request.subject))
    at = last_token_of(pair["offsets"], pair["attention_mask"], [span])[0]
    ids, first = pair["input_ids"][0].tolist(), int(pair["target_mask"][0].nonzero()[0])
    if at >= first:
        raise BadRequestError(f"subject and target share a token in {prompt!r} {target!r}; reword the prompt")
    targets = tuple((position - 1, ids[position]) for position in range(first, len(ids)))
    # The last target token predicts nothing that is asked for.
    return PushedRow(fact, tuple(ids[:-1]), at, targets, kept=tuple(range(at + 1, first - 1)))


def _target_row(handle: ModelHandle, fact: int, request: EditRequest, prompt: str, start: int) -> PushedRow:
    if request.target_true is None:
        raise BadRequestError(
            f"{request.filled!r} names no old target; training lowers the old answer, so name it as target_true"
        )
    row = pair_row(handle, fact, request, prompt, start, request.target_new)
    old = pair_row(handle, fact, request, prompt, start, request.target_true).targets[0]
    differs = old[1] != row.targets[0][1]
    return PushedRow(fact, row.ids, row.at, row.targets, old if differs else None, row.kept)


def _opening_row(handle: ModelHandle, fact: int, request: EditRequest, opening: str) -> PushedRow:
    text, start = about(opening, request)
    tokens, end = tokenise(handle, text), start + len(request.subject)
    at = max(i for i, (left, right) in enumerate(tokens.offsets) if left < end and right > start)
    return PushedRow(fact, tuple(tokens.ids), at, kept=tuple(range(at + 1, len(tokens.ids))))
