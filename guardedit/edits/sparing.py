"""Sparing namesakes: the direction that a locate-then-edit editor reads the key with is made to pass over them.

ROME's direction u is the one of least uᵀCu with uᵀk_star = 1. A name's last word is most of its key, so uᵀk is close to
1 for every bearer of the name as well. With the energy N of made-up namesakes' keys and that of the subject's own keys
around their mean, D (so that what tells the subject from its namesakes is not what one wording of it happens to have),

    C + weight · (N + steady · D)

in C's place, u leans on what is the subject's own, in every context. The price is a larger uᵀCu: ordinary text and
other neighbours move more (docs/guarded.md has both sides).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float64
from torch import Tensor

from guardedit.edits.keys import keys_at_subject
from guardedit.edits.namesakes import SPARED, namesakes
from guardedit.edits.openings import OPENINGS, about
from guardedit.models.handle import ModelHandle
from guardedit.models.second_moment import SecondMoment
from guardedit.records import EditRequest

STEADY = 1.0
"""How much the subject's own keys must agree beside how small its namesakes' must be (docs/guarded.md)."""


def spared(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    moment: SecondMoment,
    layer: int,
    weight: float,
    steady: float = STEADY,
) -> SecondMoment:
    """C with the energy of the requests' namesakes in it; C itself for weight 0 and for subjects of one word.

    `weight` is in tokens: at 1 a request's namesakes count together as much as the mean token of ordinary text.
    """
    known = [request for request in requests if weight and namesakes(request.subject, SPARED)]
    if not known:
        return moment
    matrix = moment.matrix.clone()
    for request in known:  # one after another: a batch may hold more facts than matrices fit into memory
        matrix += weight * _energy(handle, request, contexts, layer, steady).to(matrix)
    return replace(moment, matrix=matrix)


def _energy(
    handle: ModelHandle, request: EditRequest, contexts: Sequence[str], layer: int, steady: float
) -> Float64[Tensor, "d_in d_in"]:
    """N + steady · D of one request."""
    others = namesakes(request.subject, SPARED)
    own = [
        *(context + request.filled for context in contexts),
        *(about(opening, request)[0] for opening in OPENINGS),
    ]
    prompts = [*own, *(request.prompt.replace("{}", other) for other in others)]
    keys = keys_at_subject(handle, prompts, [*[request.subject] * len(own), *others], layer).double()
    apart = keys[: len(own)] - keys[: len(contexts)].mean(0)
    theirs = keys[len(own) :]
    return theirs.T @ theirs / len(theirs) + steady * (apart.T @ apart) / len(apart)
