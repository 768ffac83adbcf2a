"""Which tokens in context a report shows: those that move most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.records import EditRequest, TokenMove
from guardedit.risk.banks import KeyBank
from guardedit.risk.context import RiskContext

SHOWN_TOKENS = 12
SHOWN_FACTS = 6
Pick = Callable[[RiskContext], KeyBank]
"""Which of a layer's keys."""


def shown_tokens(
    context: RiskContext, requests: Sequence[EditRequest], move: Callable[[Pick], Tensor]
) -> tuple[TokenMove, ...]:
    """What moves most, largest first: tokens of control text, and facts about other subjects than the edited ones.

    `move` says how much each of the picked keys moves; the keys of all layers are of the same tokens.
    """
    edited = [request.subject for request in requests]

    def facts(of: RiskContext) -> KeyBank:
        return of.protected.part("facts", without=edited)

    text = top_tokens_of(context.bank, move(lambda of: of.bank), SHOWN_TOKENS)
    known = facts(context)
    named = top_tokens_of(known, move(facts), SHOWN_FACTS) if len(known.keys) else ()
    return tuple(sorted((*text, *named), key=lambda token: -token.move))


def top_tokens_of(bank: KeyBank, moves: Float[Tensor, " n"], shown: int) -> tuple[TokenMove, ...]:
    """The bank's tokens that move most: each context once and at most two of a kind, so that no word fills the list."""
    found: list[TokenMove] = []
    kinds: Counter[str] = Counter()
    contexts: set[str] = set()
    for row in moves.argsort(descending=True, stable=True).tolist():
        kind, context = bank.tokens[row].strip().lower(), bank.contexts[row]
        if kinds[kind] == 2 or context in contexts or not torch.isfinite(moves[row]):
            continue
        kinds[kind] += 1
        contexts.add(context)
        found.append(
            TokenMove(
                context=context, token=bank.tokens[row], move=float(moves[row]), domain=bank.domains[row]
            )
        )
        if len(found) == shown:
            break
    return tuple(found)
