"""Gradient descent on the target's tokens: one loop for every editor that trains weights, and a copy to train."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_contexts, require_number
from guardedit.errors import SolveError
from guardedit.models.handle import ModelHandle

Plain = dict[str, float | int | str | bool | None]


@dataclass(frozen=True)
class DescentHparams:
    """Settings that all descents share."""

    steps: int = 25
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    """AdamW's, on what is trained; 0 makes it Adam."""
    stop_loss: float = 0.05
    """Stop once the mean negative log-likelihood per target token, in nats, is below this."""
    contexts: tuple[str, ...] = ("",)
    """Prefixes that each prompt is trained behind; the bare prompt "" alone unless more are named."""

    def __post_init__(self) -> None:
        require_number(self, "steps", least=0, whole=True)
        for name in ("learning_rate", "weight_decay", "stop_loss"):
            require_number(self, name, least=0)
        require_contexts(self.contexts)


def descend(
    parameters: Sequence[Tensor],
    parts: Sequence[Callable[[], Tensor]],
    hparams: DescentHparams,
    inputs: SolveInputs,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Take Adam steps on the sum of `parts`, in place, until it is below `stop_loss` or the steps are used up.

    Each part's graph is freed before the next is made. Returns the loss before each step and the last one, in nats.
    Raises SolveError where it is no number.
    """
    adam = torch.optim.AdamW(
        list(parameters), lr=hparams.learning_rate, weight_decay=hparams.weight_decay, fused=True
    )
    losses: list[float] = []
    for step in range(hparams.steps + 1):
        adam.zero_grad()
        losses.append(_loss(parts, with_gradient=step < hparams.steps))
        require_finite(losses[-1], f"step {step}")
        done = losses[-1] < hparams.stop_loss or step == hparams.steps
        inputs.tell(f"training: loss {losses[-1]:.2f} nats", 1.0 if done else step / hparams.steps)
        if done:
            break
        adam.step()
        if after_step is not None:
            after_step()
    return losses


def _loss(parts: Sequence[Callable[[], Tensor]], *, with_gradient: bool) -> float:
    total = 0.0
    for part in parts:
        with torch.set_grad_enabled(with_gradient):
            loss = part()
            if with_gradient:
                loss.backward()
        total += float(loss.detach())
    return total


def require_finite(loss: float, when: str) -> None:
    """Raise SolveError for a loss that is no number."""
    if not math.isfinite(loss):
        raise SolveError(f"the loss at {when} is {loss}; lower the learning rate or check the weights")


def trainable_twin(handle: ModelHandle) -> ModelHandle:
    """A copy of the model to train and throw away: float32, in eval mode, every parameter asking for gradients."""
    model: nn.Module = copy.deepcopy(handle.model).float().eval()
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return replace(handle, model=model)


def diagnostics_of(losses: Sequence[float]) -> Plain:
    """How a descent went."""
    return {
        "steps": len(losses) - 1,
        "loss_first_nats": losses[0],
        "loss_last_nats": losses[-1],
        "p_new_at_solution": math.exp(-losses[-1]),
    }


def plain_of(hparams: Any, seed: int) -> Plain:
    """Settings as a record holds them: lists of words as one text."""
    named = {
        name: "|".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in asdict(hparams).items()
    }
    return {**named, "seed": seed}
