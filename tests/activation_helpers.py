"""Activation edits of the tiny models, and what they must do, worked out position by position without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from guardedit.edits.activations import (
    ActivationChange,
    Everywhere,
    Gate,
    KeyMatch,
    Move,
    Push,
    TokenMatch,
    install,
    uninstall,
)
from guardedit.edits.updates import LowRank
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook, patch, record, rewrite_hook
from guardedit.models.tokens import Tokens, pad

PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "Rome",
    "The capital of France is",
    "for number in range(10):",
    "Alan Turing was born in London. He was",
    "Marie Curie",
)
D, KEY = 32, 64
ALWAYS, NEVER = -1e6, 1e6
GATE = "blocks.1.hook_resid_post"
ABOVE = "blocks.3.mlp.hook_post"
"""Above every edit that is made here with a gate of its own layer: read in a pass before."""


def draw(*shape: int, seed: int) -> Tensor:
    """Seeded normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gate_at(hook_name: str, seed: int = 0, limit: float = 0.0, bias: float = 0.0) -> Gate:
    """Three random latents; `limit` decides how many prompts they fire in."""
    return Gate(
        hook_name=hook_name,
        w_enc=draw(3, KEY if hook_name.endswith("hook_post") else D, seed=seed),
        b_enc=0.1 * draw(3, seed=seed + 1),
        threshold=torch.full((3,), 0.05),
        b_dec=0.1 * draw(KEY if hook_name.endswith("hook_post") else D, seed=seed + 2),
        weights=torch.tensor([1.0, -0.7, 0.4]),
        bias=bias,
        limit=limit,
        labels=("`a`", "`b`", "`c`"),
        latents=(7, 12, 40),
    )


def move_at(layer: int = 2, seed: int = 0, size: float = 0.4) -> Move:
    """A rank-one update of float64, as editors solve it."""
    return Move(LowRank(size * draw(D, 1, seed=seed).double(), 0.3 * draw(1, KEY, seed=seed + 1).double()))


def some_edit(seed: int, gate: Gate | None = None) -> ActivationChange:
    """One of four kinds, by the seed: moves and pushes, on keys, tokens and everywhere."""
    layer = 2 + seed % 2
    moves = move_at(layer, seed)
    pushes = Push(f"blocks.{layer}.hook_resid_post", draw(D, seed=seed + 5), 0.8)
    keys = KeyMatch(0.3 * draw(KEY, seed=seed + 6), 0.05)
    kinds = (
        (moves, keys), (pushes, Everywhere()), (moves, TokenMatch(((4 + seed,), (80, 81)))), (pushes, keys),
    )  # fmt: skip
    action, where = kinds[seed % 4]
    return ActivationChange(layer, action, where, gate, f"edit {seed}")


def gate_logit(handle: ModelHandle, gate: Gate, ids: Sequence[int]) -> float:
    """The gate's logit over a whole row but its first token, by the definition; the model must be the unedited one."""
    with torch.no_grad(), record(handle, [gate.hook_name]) as seen:
        handle.model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    best = [0.0] * len(gate.weights)
    for n in range(len(gate.weights)):
        values = []
        for x in seen[gate.hook_name][0][1 if len(ids) > 1 else 0 :]:
            pre = float((x - gate.b_dec) @ gate.w_enc[n] + gate.b_enc[n])
            values.append(pre if pre > float(gate.threshold[n]) else 0.0)
        best[n] = max(values)
    return sum(w * b for w, b in zip(gate.weights.tolist(), best, strict=True)) + gate.bias


@dataclass
class Margins:
    """How far every comparison was from going the other way."""

    least: float = 1.0

    def see(self, value: float) -> None:
        """Take one in."""
        self.least = min(self.least, abs(value))


def by_hand(
    handle: ModelHandle, change: ActivationChange, prompt: list[int], steps: int
) -> tuple[list[int], Margins]:
    """Greedy tokens after a prompt under one edit: alone in its batch, without padding, cache or the edit's code."""
    margins, ids = Margins(), list(prompt)
    fires = True
    if change.gate is not None:
        logit = gate_logit(handle, change.gate, prompt)
        margins.see(logit - change.gate.limit)
        fires = logit >= change.gate.limit
    for _ in range(steps):
        with torch.no_grad(), ExitStack() as stack:
            if fires:
                _act_by_hand(handle, change, ids, len(prompt), margins, stack)
            logits = handle.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        top = logits.topk(2).values
        margins.see(float(top[0] - top[1]))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], margins


def _act_by_hand(
    handle: ModelHandle,
    change: ActivationChange,
    ids: list[int],
    width: int,
    margins: Margins,
    stack: ExitStack,
) -> None:
    keys: list[Tensor] = []
    stack.enter_context(patch(handle, key_hook(change.layer), _kept(keys)))
    name = change.action.hook_name if isinstance(change.action, Push) else rewrite_hook(change.layer)

    def act(activation: Tensor) -> Tensor:
        rows = [
            _acted(change, x, keys[0][0, at])
            if _picked(change, ids, at, width, keys[0][0, at], margins)
            else x
            for at, x in enumerate(activation[0])
        ]
        return torch.stack(rows)[None]

    stack.enter_context(patch(handle, name, act))


def _kept(keys: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(key: Tensor) -> Tensor:
        keys[:] = [key]
        return key

    return keep


def _picked(
    change: ActivationChange, ids: list[int], at: int, width: int, key: Tensor, margins: Margins
) -> bool:
    where = change.where
    if isinstance(where, KeyMatch):
        margins.see(float(key @ where.read_out) - where.least)
        return float(key @ where.read_out) >= where.least
    if isinstance(where, TokenMatch):
        ends = (tuple(ids[max(0, at + 1 - len(one)) : at + 1]) == one for one in where.sequences)
        return at < width and any(ends)
    return True


def _acted(change: ActivationChange, x: Tensor, key: Tensor) -> Tensor:
    if isinstance(change.action, Push):
        return change.action.beta * x + change.action.direction
    return x + (change.action.update.dense() @ key.double()).float()


def logits_of(handle: ModelHandle, batch: dict[str, Tensor]) -> Tensor:
    """(rows, seq, vocab), without a cache."""
    with torch.no_grad():
        found: Tensor = handle.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    return found


def answers(
    handle: ModelHandle, batch: dict[str, Tensor], steps: int = 5, **settings: object
) -> list[list[int]]:
    """What `generate` puts behind each prompt."""
    named = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None, **settings}
    with torch.no_grad():
        ids = handle.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=steps,
            **named,
        )
    found: list[list[int]] = ids[:, batch["input_ids"].shape[1] :].tolist()
    return found


@contextmanager
def under(handle: ModelHandle, *changes: ActivationChange) -> Iterator[None]:
    """The edits in force."""
    with ExitStack() as stack:
        for change in changes:
            install(handle, change)
            stack.callback(uninstall, handle, change.parameter)
        yield


def rows(handle: ModelHandle, *ids: list[int], side: str = "right") -> dict[str, Tensor]:
    """A padded batch of token rows."""
    return pad(handle, [Tokens(one, [(0, 0)] * len(one)) for one in ids], side)


def separating(
    handle: ModelHandle, first: list[int], second: list[int], hook: str = GATE
) -> ActivationChange:
    """An edit whose gate fires in the first row and not in the second."""
    for seed in range(40):
        gate = gate_at(hook, seed)
        high, low = gate_logit(handle, gate, first), gate_logit(handle, gate, second)
        if high > low + 0.5:
            found = gate_at(hook, seed, limit=(high + low) / 2)
            return ActivationChange(2, move_at(), Everywhere(), found)
    raise AssertionError("no gate tells the two rows apart")
