"""Where a user's turn begins, and where token sequences end, inside rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Ids = tuple[int, ...]
"""Token ids in a row."""
_SAID = ("guardedit-asks", "guardedit-answers", "guardedit-asks-again")


def turn_marker(tokenizer: Any) -> Ids:
    """Token ids that begin a user's turn behind an answer, from the tokenizer's chat template.

    What the template puts between an assistant's words and the next user's, white space at either end left out: it
    melts into the words beside it. Empty without a template, or where the template cannot render such a talk.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    between = _between(tokenizer)
    ids = list(tokenizer(between, add_special_tokens=False)["input_ids"]) if between.strip() else []
    while ids and not str(tokenizer.decode(ids[:1])).strip():
        ids.pop(0)
    while ids and not str(tokenizer.decode(ids[-1:])).strip():
        ids.pop()
    return tuple(int(one) for one in ids)


def _between(tokenizer: Any) -> str:
    """The rendered text between an answer and the next question."""
    from jinja2 import TemplateError

    roles = ("user", "assistant", "user")
    talk = [{"role": role, "content": said} for role, said in zip(roles, _SAID, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except TemplateError:
        return ""
    head, found, _ = text.rpartition(_SAID[2])
    return head.rpartition(_SAID[1])[2] if found and _SAID[1] in head else ""


def ends_of(ids: Int[Tensor, "rows seq"], sequences: Iterable[Ids]) -> Bool[Tensor, "rows seq"]:
    """Positions of the last token of any of the sequences; ids of −1 (padding) match nothing."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for sequence in sequences:
        room = ids.shape[1] - len(sequence) + 1
        if room < 1 or not sequence:
            continue
        hit = ids[:, :room] == sequence[0]
        for at, token in enumerate(sequence[1:], start=1):
            hit = hit & (ids[:, at : at + room] == token)
        found[:, len(sequence) - 1 :] |= hit
    return found
