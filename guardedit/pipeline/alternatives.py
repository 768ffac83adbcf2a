"""The form of an edit that a policy asks for in place of an overwrite: the same fact, held to a context."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from guardedit.gate.policy import demanding
from guardedit.gate.rules import Policy
from guardedit.records import EditRequest, Judgement

CONTEXT = "hypothesis"
"""The kind that fits most facts; whoever proposes the edit may name another before planning it."""
FILE = "in_context.jsonl"
"""Beside the plan; what `guardedit plan FILE --editor contextual` takes."""


def in_context_form(
    requests: Sequence[EditRequest], judgement: Judgement, policy: Policy
) -> tuple[EditRequest, ...]:
    """The requests as ones that hold in a context, where a broken limit asks for that form; else none."""
    if not demanding(judgement.findings, policy):
        return ()
    return tuple(
        request if request.context is not None else request.model_copy(update={"context": CONTEXT})
        for request in requests
    )


def request_lines(requests: Iterable[EditRequest]) -> bytes:
    """A request file: JSON lines."""
    dumped = (request.model_dump(mode="json", exclude_none=True) for request in requests)
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in dumped).encode()
