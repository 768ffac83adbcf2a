"""A request seen from its key: everything that scores before the solve are made of.

Each piece is computed when it is asked for. Where there are many requests, `views_of` fills the costly pieces of all
views in a few forward passes; a test compares them with those that a view computes on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from guardedit.edits.keys import (
    Key,
    by_length,
    key_of,
    keys_at_subject,
    keys_at_subjects,
    keys_everywhere,
    keys_everywhere_in,
    keys_of,
)
from guardedit.errors import GuardeditError
from guardedit.records import EditRequest
from guardedit.risk.context import RiskContext
from guardedit.risk.neighbours import NearProbes, near_probes, near_probes_of

T = TypeVar("T")

FEW = 16
"""Requests up to which each has as many near prompts as a request alone; beyond, half as many."""
_VIEWS = 32
"""Views whose near prompts are read together."""


@dataclass(frozen=True)
class KeyView:
    """One request seen from its key. Computed piece by piece, so that one failing piece hides no other."""

    context: RiskContext
    request: EditRequest
    n_near: int

    @cached_property
    def key(self) -> Key:
        """The key, over the context's prefixes."""
        c = self.context
        return key_of(c.handle, self.request, c.layer, c.contexts)

    @cached_property
    def k(self) -> Float[Tensor, " d_in"]:
        """k_star, float64."""
        return self.key.k_star.double().cpu()

    @cached_property
    def whitened(self) -> Float[Tensor, " d_in"]:
        """C⁻¹k."""
        return self.context.need_second_moment.solve(self.k).cpu()

    @cached_property
    def leverage(self) -> float:
        """kᵀC⁻¹k; raises ZeroDivisionError unless it is positive."""
        value = float(self.k @ self.whitened)
        if not value > 0:
            raise ZeroDivisionError(f"kᵀC⁻¹k is {value}; it must be positive")
        return value

    def p(self, keys: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n"]:
        """p(x) of each key."""
        return keys.double().cpu() @ self.whitened / self.leverage

    @cached_property
    def near(self) -> NearProbes:
        """Prompts about other subjects."""
        return near_probes(self.context.handle, self.request, self.n_near, self.context.seed)

    @property
    def near_named(self) -> tuple[tuple[str, str], ...]:
        """(prompt, subject) of the near prompts whose subject is known."""
        return tuple((probe.prompt, probe.subject) for probe in self.near.probes if probe.subject is not None)

    @property
    def near_whole(self) -> tuple[str, ...]:
        """The near prompts whose subject is unknown."""
        return tuple(probe.prompt for probe in self.near.probes if probe.subject is None)

    @cached_property
    def near_keys(self) -> Float[Tensor, "n d_in"]:
        """A key per near prompt: at its subject's last token; where the subject is unknown, the one that moves most."""
        c, named, whole = self.context, self.near_named, self.near_whole
        found = []
        if named:
            prompts, subjects = zip(*named, strict=True)
            found.append(keys_at_subject(c.handle, prompts, subjects, c.layer))
        return self.joined(found, keys_everywhere(c.handle, whole, c.layer) if whole else ())

    def joined(self, known: Sequence[Tensor], whole: Sequence[Tensor]) -> Float[Tensor, "n d_in"]:
        """Keys (m, d_in) at known subjects, then of each whole prompt (seq, d_in) the one that moves most."""
        found = list(known)
        for keys in whole:
            # Position 0 is like no other; a one-token prompt has nothing else.
            inside = keys[1:] if len(keys) > 1 else keys
            found.append(inside[self.p(inside).abs().argmax()][None])
        width = self.context.handle.d_in(self.context.layer)
        return torch.cat(found).cpu() if found else torch.empty(0, width)

    @cached_property
    def neuron_weights(self) -> Float[Tensor, " d_in"]:
        """|k_n (C⁻¹k)_n| / Σ: how much of kᵀC⁻¹k a neuron carries."""
        carried = (self.k * self.whitened).abs()
        return carried / carried.sum()

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that the request names, the old one first."""
        return tuple(t for t in (self.request.target_true, self.request.target_new) if t is not None)

    @cached_property
    def surprises(self) -> dict[str, tuple[float, int]]:
        """Per named target, −log P(target | prompt) in nats, summed over its tokens, and their number."""
        found = self.context.handle.token_logprobs([self.request.filled] * len(self.targets), self.targets)
        return self.surprised(found)

    def surprised(self, logprobs: Sequence[Tensor]) -> dict[str, tuple[float, int]]:
        """`surprises` of the targets' token log-probabilities."""
        return {
            target: (-float(found.double().sum()), len(found))
            for target, found in zip(self.targets, logprobs, strict=True)
        }

    def at(self, context: RiskContext) -> KeyView:
        """The same request, with the same near prompts, at another layer."""
        twin = KeyView(context, self.request, self.n_near)
        vars(twin)["near"] = self.near
        return twin

    @cached_property
    def own_answer(self) -> tuple[str, float]:
        """The model's most likely next token after the prompt and its log-probability in nats."""
        handle = self.context.handle
        batch = handle.encode([self.request.filled])
        last = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        last[0, -1] = True
        with torch.no_grad():
            hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
            logprobs = handle.logits_at(hidden, last)[0].double().log_softmax(-1)
        top = int(logprobs.argmax())
        return str(handle.tokenizer.decode([top])), float(logprobs[top])


def views_of(context: RiskContext, requests: Sequence[EditRequest]) -> tuple[KeyView, ...]:
    """A view per request; those of many requests are filled together.

    Raises BadRequestError for a request that cannot be understood.
    """
    n_near = context.sizes.near if len(requests) <= FEW else max(2, context.sizes.near // 2)
    views = tuple(KeyView(context, request, n_near) for request in requests)
    if len(views) > 1:
        probes = near_probes_of(context.handle, requests, n_near, context.seed)
        keys = keys_of(context.handle, requests, context.layer, context.contexts)
        for view, near, key in zip(views, probes, keys, strict=True):
            vars(view).update(near=near, key=key)
        fill_near_keys((views,))
    return views


def fill_near_keys(layers: Sequence[Sequence[KeyView]]) -> None:
    """Take the near keys of many requests together, at one layer or several: `layers[l][i]` is request i at layer l."""
    for start in range(0, len(layers[0]), _VIEWS):
        _fill_near_keys([views[start : start + _VIEWS] for views in layers])


def _fill_near_keys(layers: Sequence[Sequence[KeyView]]) -> None:
    named = _by_length({pair: pair[0] for view in layers[0] for pair in view.near_named})
    whole = _by_length({prompt: prompt for view in layers[0] for prompt in view.near_whole})
    at = [views[0].context.layer for views in layers]
    handle = layers[0][0].context.handle
    prompts, subjects = [prompt for prompt, _ in named], [subject for _, subject in named]
    known = keys_at_subjects(handle, prompts, subjects, at) if named else {}
    parts = [keys_everywhere_in(handle, whole[i : i + _VIEWS], at) for i in range(0, len(whole), _VIEWS)]
    for views in layers:
        layer = views[0].context.layer
        row = {pair: known[layer][i][None] for i, pair in enumerate(named)}
        seen = dict(zip(whole, (keys for part in parts for keys in part[layer]), strict=True))
        for view in views:
            _fill(view, row, seen)


def _fill(view: KeyView, row: dict[tuple[str, str], Tensor], seen: dict[str, Tensor]) -> None:
    try:
        found = view.joined([row[pair] for pair in view.near_named], [seen[text] for text in view.near_whole])
    except (GuardeditError, ArithmeticError, LinAlgError):
        return  # the score that asks for them meets the same error and says so
    vars(view)["near_keys"] = found


def fill_surprises(views: Sequence[KeyView]) -> None:
    """Ask the model for the targets of many requests together."""
    prompts = [view.request.filled for view in views for _ in view.targets]
    found = iter(views[0].context.handle.token_logprobs(prompts, [t for view in views for t in view.targets]))
    for view in views:
        vars(view)["surprises"] = view.surprised([next(found) for _ in view.targets])


def _by_length(texts: dict[T, str]) -> list[T]:
    """Keys in the order of their texts' lengths."""
    names = list(texts)
    return [names[i] for i in by_length(list(texts.values()))]
