"""Values: what the rewrite module shall answer at a subject's last token so that the model says the new target.

`v_star = W k_star + r`, where the residual r is found by Adam (Meng et al. 2022, eq. 4): mean negative log-likelihood
of the target over contexts, a KL term on "{subject} is a" that keeps what the subject is, and a bound on ‖r‖.
Many facts are optimised in one batch; each has its own residual, bound and end, so it gets the value that it would get
alone (up to the rounding of larger matrix products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guardedit.edits.contrast import guarded_values
from guardedit.edits.keys import Key
from guardedit.edits.objective import Fact, make_objective
from guardedit.edits.rewordings import rewordings
from guardedit.edits.value_descent import Descent
from guardedit.edits.value_types import Told, Value, ValueHparams
from guardedit.errors import SolveError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest

__all__ = ["Value", "ValueHparams", "optimise_value", "optimise_values"]


def optimise_value(
    handle: ModelHandle,
    request: EditRequest,
    key: Key,
    layer: int,
    contexts: Sequence[str],
    hparams: ValueHparams,
    progress: Told | None = None,
) -> Value:
    """Find the residual that makes the model say `target_new`, starting from zero; the model is left as it was.

    `progress` is told step and loss. Raises SolveError if the loss stops being a number or the layer cannot reach the
    target, BadRequestError where subject and target share a token.
    """
    return optimise_values(handle, [request], [key], layer, contexts, hparams, progress)[0]


def optimise_values(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    keys: Sequence[Key],
    layer: int,
    contexts: Sequence[str],
    hparams: ValueHparams,
    progress: Told | None = None,
    *,
    starts: Sequence[Tensor | None] | None = None,
) -> tuple[Value, ...]:
    """The values of many requests, in their order: each as `optimise_value` finds it, `facts_at_once` in one batch.

    A fact leaves its batch once its own loss is below `stop_loss`. With `keep_openings`, values are guarded instead
    (`guardedit.edits.contrast`), for all `steps`. With `starts`, an optimisation begins at a given residual instead of
    zero, and `warm_contexts` has no say. Errors as `optimise_value`.
    """
    if starts is None and 0 < hparams.warm_contexts < len(contexts):
        return _warmed(handle, requests, keys, layer, contexts, hparams, progress)
    bounds = [_bound(handle, key, layer, hparams) for key in keys]
    found: dict[int, Value] = {}
    with preserved(handle), torch.enable_grad():
        for chunk in _chunks(handle, requests, hparams.facts_at_once):
            facts = [_fact(requests[i], contexts, hparams) for i in chunk]
            first = [starts[i] if starts else None for i in chunk]
            own = [bounds[i] for i in chunk]
            if hparams.keep_openings:
                values = guarded_values(handle, facts, layer, own, hparams, first, progress)
            else:
                values = Descent(hparams, own).run(make_objective(handle, facts, layer), first, progress)
            found.update(zip(chunk, values, strict=True))
    return tuple(found[index] for index in range(len(requests)))


def _warmed(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    keys: Sequence[Key],
    layer: int,
    contexts: Sequence[str],
    hparams: ValueHparams,
    progress: Told | None,
) -> tuple[Value, ...]:
    """Few contexts first: most of the way is the same for all of them, and a step costs as much as there are rows."""
    cheap = replace(hparams, warm_contexts=0, keep_openings=0)
    few = contexts[: hparams.warm_contexts]
    warm = optimise_values(handle, requests, keys, layer, few, cheap, progress)
    starts = [value.residual.to(handle.device, torch.float32) for value in warm]
    found = optimise_values(handle, requests, keys, layer, contexts, hparams, progress, starts=starts)
    pairs = zip(warm, found, strict=True)
    return tuple(replace(value, losses=first.losses + value.losses) for first, value in pairs)


def _bound(handle: ModelHandle, key: Key, layer: int, hparams: ValueHparams) -> float:
    weight = handle.weight(layer).detach().double()
    bound = hparams.clamp_norm_factor * float((weight @ key.k_star.to(weight.device)).norm())
    if not bound > 0:
        raise SolveError(f"layer {layer} answers the subject's key with {bound}; edit another layer")
    return bound


def _fact(request: EditRequest, contexts: Sequence[str], hparams: ValueHparams) -> Fact:
    words = rewordings(request.prompt) if hparams.reword else ()
    return Fact(request, tuple(contexts), hparams.kl_prompt, rewordings=words)


def _chunks(handle: ModelHandle, requests: Sequence[EditRequest], size: int) -> list[list[int]]:
    """Request numbers in batches, those of similar length behind the subject together: padding is work for nothing."""
    tails = [r.prompt[r.prompt.index("{}") + 2 :] + " " + r.target_new for r in requests]
    lengths = [int(handle.encode([tail])["attention_mask"].sum()) for tail in tails]
    order = sorted(range(len(requests)), key=lambda index: (lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
