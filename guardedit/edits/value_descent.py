"""Adam on the residuals of one batch of facts: every fact with its own loss, bound and end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from guardedit.edits.objective import Losses, Objective
from guardedit.edits.value_types import Told, Value, ValueHparams
from guardedit.errors import SolveError


@dataclass
class Descent:
    """The state of one batch; `run` descends until every fact is done."""

    hparams: ValueHparams
    bounds: list[float]
    """Largest ‖r‖ of each fact."""
    losses: list[list[float]] = field(init=False)
    clamped: list[bool] = field(init=False)
    done: dict[int, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.bounds)
        self.losses, self.clamped = [[] for _ in range(count)], [False] * count

    def run(
        self, objective: Objective, starts: Sequence[Tensor | None], progress: Told | None
    ) -> list[Value]:
        """The values in the batch's order."""
        handle, count = objective.handle, len(self.bounds)
        residuals = torch.zeros(count, handle.d_model, device=handle.device)
        for row, start in zip(residuals, starts, strict=True):
            if start is not None:
                row.copy_(start)
        residuals.requires_grad_(True)
        adam = torch.optim.Adam([residuals], lr=self.hparams.learning_rate)
        for step in range(self.hparams.steps + 1):
            losses = objective.losses(residuals)
            active = [index for index in range(count) if index not in self.done]
            self._note(step, losses, active)
            if progress is not None:
                progress(step, sum(self.losses[i][-1] for i in active) / len(active))
            finished = [i for i in active if self._is_done(step, i, self._value(i, losses, residuals))]
            if len(self.done) == count:
                break
            if finished:
                objective = objective.without(finished)
            self._step(adam, residuals, losses)
        return [replace(self.done[index], losses=tuple(self.losses[index])) for index in range(count)]

    def _note(self, step: int, losses: Losses, active: list[int]) -> None:
        for index in active:
            for name, term in (("loss", losses.nll), ("KL term", losses.kl)):
                value = float(term[index].detach())
                if not math.isfinite(value):
                    raise SolveError(
                        f"the {name} at step {step} is {value}; lower the learning rate or check the weights"
                    )
            self.losses[index].append(float(losses.nll[index].detach()))

    def _value(self, index: int, losses: Losses, residuals: Tensor) -> Value:
        return Value(
            residual=residuals[index].detach().double().clone(),
            losses=(self.losses[index][-1],),
            kl_nats=float(losses.kl[index].detach()),
            p_new=math.exp(-self.losses[index][-1]),
            clamped=self.clamped[index],
        )

    def _is_done(self, step: int, index: int, value: Value) -> bool:
        """Whether the fact has its value, which is then in `done`."""
        if step == self.hparams.steps or value.losses[-1] < self.hparams.stop_loss:
            self.done[index] = value
        return index in self.done

    def _step(self, adam: torch.optim.Adam, residuals: Tensor, losses: Losses) -> None:
        """One step of every fact that is not done; Adam works entry by entry, so facts do not see each other."""
        remaining = torch.tensor(
            [i not in self.done for i in range(len(self.bounds))], device=residuals.device
        )
        sizes = torch.tensor(self.bounds, device=residuals.device) / self.hparams.clamp_norm_factor
        decay = self.hparams.weight_decay * residuals.norm(dim=1) / sizes**2
        total = losses.nll + self.hparams.kl_factor * losses.kl + decay
        adam.zero_grad()
        total[remaining].sum().backward()
        adam.step()
        self._project(residuals)

    def _project(self, residuals: Tensor) -> None:
        """Bring every residual back inside its bound, in place."""
        for index, bound in enumerate(self.bounds):
            norm = float(residuals[index].detach().norm())
            if norm > bound and index not in self.done:
                with torch.no_grad():
                    residuals[index].mul_(bound / norm)
                self.clamped[index] = True
