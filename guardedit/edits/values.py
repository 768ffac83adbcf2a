"""Values: what the rewrite module shall answer at a subject's last token so that the model says the new target.

`v_star = W k_star + r`, where the residual r is found by Adam (Meng et al. 2022, eq. 4): mean negative log-likelihood
of the target over contexts, a KL term on "{subject} is a" that keeps what the subject is, and a bound on ‖r‖.
Many facts are optimised in one batch; each has its own residual, bound and end, so it gets the value that it would get
alone (up to the rounding of larger matrix products).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.keys import Key
from guardedit.edits.objective import Fact, Losses, Objective, make_objective
from guardedit.edits.settings import require_number
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest


@dataclass(frozen=True)
class ValueHparams:
    """Settings of the optimisation; names as in the published code's."""

    steps: int = 25
    learning_rate: float = 0.5
    kl_factor: float = 0.0625
    weight_decay: float = 1e-3
    clamp_norm_factor: float = 3.0
    """‖r‖ is at most this many times ‖W k_star‖."""
    stop_loss: float = 0.05
    """Stop once the mean negative log-likelihood per target token, in nats, is below this."""
    kl_prompt: str = "{} is a"
    """What the subject is shall stay; one `{}`, where the subject goes."""
    facts_at_once: int = 16
    """Facts optimised in one batch; more use more memory."""

    def __post_init__(self) -> None:
        require_number(self, "steps", least=0, whole=True)
        require_number(self, "facts_at_once", least=1, whole=True)
        require_number(self, "clamp_norm_factor", least=0, above=True)
        for name in ("learning_rate", "kl_factor", "weight_decay", "stop_loss"):
            require_number(self, name, least=0)
        if not isinstance(self.kl_prompt, str) or self.kl_prompt.count("{}") != 1:
            raise BadRequestError(f"kl_prompt is {self.kl_prompt!r}; it needs exactly one `{{}}`")


@dataclass(frozen=True, eq=False)
class Value:
    """The outcome of one optimisation."""

    residual: Float[Tensor, " d_out"]
    """r = v_star − W k_star, float64."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood of the target, per step, in nats per token."""
    kl_nats: float
    p_new: float
    """Geometric mean probability of a target token at the last step."""
    clamped: bool
    kept_nats: float = 0.0
    """Mean KL(unedited ‖ edited) over the kept texts at the last step; 0 without any."""


@dataclass(frozen=True)
class Keep:
    """Texts about each request's subject whose next tokens shall stay, and how much that weighs against the target."""

    texts: tuple[tuple[str, ...], ...]
    """Per request; each text contains the subject."""
    weights: tuple[float, ...]
    """Per request, in nats of target likelihood per nat of KL(unedited ‖ edited)."""


Told = Callable[[int, float], None]
"""Called with the step and the mean loss of the facts that are still in it."""


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
    keep: Keep | None = None,
    starts: Sequence[Tensor | None] | None = None,
) -> tuple[Value, ...]:
    """The values of many requests, in their order: each as `optimise_value` finds it, `facts_at_once` in one batch.

    A fact leaves its batch once its own loss is below `stop_loss`. With `keep`, texts about each subject are held;
    with `starts`, an optimisation begins at a given residual instead of zero. Errors as `optimise_value`.
    """
    bounds = [_bound(handle, key, layer, hparams) for key in keys]
    found: dict[int, Value] = {}
    with preserved(handle), torch.enable_grad():
        for chunk in _chunks(handle, requests, hparams.facts_at_once):
            facts = [_fact(requests[i], contexts, hparams, keep, i) for i in chunk]
            weights = [keep.weights[i] if keep else 0.0 for i in chunk]
            first = [starts[i] if starts else None for i in chunk]
            descent = _Descent(hparams, [bounds[i] for i in chunk], weights)
            values = descent.run(make_objective(handle, facts, layer), first, progress)
            found.update(zip(chunk, values, strict=True))
    return tuple(found[index] for index in range(len(requests)))


def _bound(handle: ModelHandle, key: Key, layer: int, hparams: ValueHparams) -> float:
    bound = hparams.clamp_norm_factor * float((handle.weight(layer).detach().double() @ key.k_star).norm())
    if not bound > 0:
        raise SolveError(f"layer {layer} answers the subject's key with {bound}; edit another layer")
    return bound


def _fact(
    request: EditRequest, contexts: Sequence[str], hparams: ValueHparams, keep: Keep | None, index: int
) -> Fact:
    return Fact(request, tuple(contexts), hparams.kl_prompt, keep.texts[index] if keep else ())


def _chunks(handle: ModelHandle, requests: Sequence[EditRequest], size: int) -> list[list[int]]:
    """Request numbers in batches, those of similar length behind the subject together: padding is work for nothing."""
    tails = [r.prompt[r.prompt.index("{}") + 2 :] + " " + r.target_new for r in requests]
    lengths = [int(handle.encode([tail])["attention_mask"].sum()) for tail in tails]
    order = sorted(range(len(requests)), key=lambda index: (lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass
class _Descent:
    """Adam on the residuals of one batch: every fact with its own loss, bound and end."""

    hparams: ValueHparams
    bounds: list[float]
    keep_weights: list[float]
    losses: list[list[float]] = field(default_factory=list)
    clamped: list[bool] = field(default_factory=list)
    done: dict[int, Value] = field(default_factory=dict)

    def run(
        self, objective: Objective, starts: Sequence[Tensor | None], progress: Told | None
    ) -> list[Value]:
        """Descend until every fact is done; the values in the batch's order."""
        handle, count = objective.suffix.handle, len(self.bounds)
        self.losses, self.clamped = [[] for _ in range(count)], [False] * count
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
            finished = self._finish(step, losses, residuals, active)
            if len(self.done) == count:
                break
            if finished:
                objective = objective.without(finished)
            self._step(adam, residuals, losses)
        return [self.done[index] for index in range(count)]

    def _note(self, step: int, losses: Losses, active: list[int]) -> None:
        for index in active:
            for name, term in (("loss", losses.nll), ("KL term", losses.kl), ("kept term", losses.kept)):
                value = float(term[index].detach())
                if not math.isfinite(value):
                    raise SolveError(
                        f"the {name} at step {step} is {value}; lower the learning rate or check the weights"
                    )
            self.losses[index].append(float(losses.nll[index].detach()))

    def _finish(self, step: int, losses: Losses, residuals: Tensor, active: list[int]) -> list[int]:
        last = step == self.hparams.steps
        finished = [i for i in active if last or self.losses[i][-1] < self.hparams.stop_loss]
        for index in finished:
            self.done[index] = Value(
                residual=residuals[index].detach().double().clone(),
                losses=tuple(self.losses[index]),
                kl_nats=float(losses.kl[index].detach()),
                p_new=math.exp(-self.losses[index][-1]),
                clamped=self.clamped[index],
                kept_nats=float(losses.kept[index].detach()),
            )
        return finished

    def _step(self, adam: torch.optim.Adam, residuals: Tensor, losses: Losses) -> None:
        """One step of every fact that is not done; Adam works entry by entry, so facts do not see each other."""
        remaining = torch.tensor(
            [i not in self.done for i in range(len(self.bounds))], device=residuals.device
        )
        sizes = torch.tensor(self.bounds, device=residuals.device) / self.hparams.clamp_norm_factor
        weights = torch.tensor(self.keep_weights, device=residuals.device)
        decay = self.hparams.weight_decay * residuals.norm(dim=1) / sizes**2
        total = losses.nll + self.hparams.kl_factor * losses.kl + weights * losses.kept + decay
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
