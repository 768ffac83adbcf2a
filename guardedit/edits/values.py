"""Values: what the rewrite module shall answer at a subject's last token so that the model says the new target.

`v_star = W k_star + r`, where the residual r is found by Adam (Meng et al. 2022, eq. 4): mean negative log-likelihood
of the target over contexts, a KL term on "{subject} is a" that keeps what the subject is, and a bound on ‖r‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.deltas import require_linear
from guardedit.edits.keys import Key, last_token_of, subject_span
from guardedit.edits.settings import require_number
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import patch, rewrite_hook
from guardedit.models.suffix import Suffix, split_rows
from guardedit.models.tokens import encode_pairs
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

    def __post_init__(self) -> None:
        require_number(self, "steps", least=0, whole=True)
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


def optimise_values(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    keys: Sequence[Key],
    layer: int,
    contexts: Sequence[str],
    hparams: ValueHparams,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Value, ...]:
    """The values of many requests, each found as `optimise_value` finds it."""
    return tuple(
        optimise_value(handle, request, key, layer, contexts, hparams, progress)
        for request, key in zip(requests, keys, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Objective:
    """Everything the loss needs, computed once."""

    suffix: Suffix
    target_rows: Tensor
    """Boolean (batch, seq): positions whose next token belongs to the target."""
    target_ids: Tensor
    row_weights: Tensor
    """One weight per target position: 1 / (contexts · target tokens)."""
    kl_row: int
    base_logprobs: Tensor


def optimise_value(
    handle: ModelHandle,
    request: EditRequest,
    key: Key,
    layer: int,
    contexts: Sequence[str],
    hparams: ValueHparams,
    progress: Callable[[int, float], None] | None = None,
) -> Value:
    """Find the residual that makes the model say `target_new`, starting from zero; the model is left as it was.

    `progress` is told step and loss. Raises SolveError if the loss stops being a number or the layer cannot reach the
    target, BadRequestError where subject and target share a token.
    """
    require_linear(handle)
    with preserved(handle), torch.enable_grad():
        objective = _objective(handle, request, layer, contexts, hparams)
        _require_path(objective, layer)
        v_start = handle.weight(layer).detach().double() @ key.k_star
        bound = hparams.clamp_norm_factor * float(v_start.norm())
        if not bound > 0:
            raise SolveError(f"layer {layer} answers the subject's key with {bound}; edit another layer")
        return _descend(objective, layer, bound, hparams, progress)


def _objective(
    handle: ModelHandle, request: EditRequest, layer: int, contexts: Sequence[str], hparams: ValueHparams
) -> _Objective:
    prompts = [context + request.filled for context in contexts]
    pairs = encode_pairs(handle, prompts, [request.target_new] * len(prompts))
    spans = [subject_span(request, context) for context in contexts]
    splits = last_token_of(pairs["offsets"], pairs["attention_mask"], spans)
    lengths = pairs["attention_mask"].sum(1).tolist()
    # The last target token predicts nothing that is asked for.
    rows = [pairs["input_ids"][i, : n - 1].tolist() for i, n in enumerate(lengths)]
    rows, splits = _with_kl_row(handle, request, rows, splits, hparams)
    suffix = split_rows(handle, rows, splits, layer)
    predicts, ids, weights = _target_positions(pairs, splits, suffix)
    objective = _Objective(suffix, predicts, ids, weights, len(contexts), torch.empty(0))
    with torch.no_grad():
        base = _kl_logprobs(objective, suffix.hidden())
    return _Objective(suffix, predicts, ids, weights, len(contexts), base)


def _with_kl_row(
    handle: ModelHandle, request: EditRequest, rows: list[list[int]], splits: list[int], hparams: ValueHparams
) -> tuple[list[list[int]], list[int]]:
    encoded = handle.encode([hparams.kl_prompt.replace("{}", request.subject)])
    start = hparams.kl_prompt.index("{}")
    at = last_token_of(encoded["offsets"], encoded["attention_mask"], [(start, start + len(request.subject))])
    return [*rows, encoded["input_ids"][0].tolist()], [*splits, *at]


def _target_positions(
    pairs: dict[str, Tensor], splits: Sequence[int], suffix: Suffix
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the target is predicted, its token ids, and each one's weight in the loss."""
    predicts = torch.zeros_like(suffix.mask)
    ids, weights = [], []
    targets = pairs["target_mask"]
    for row in range(targets.shape[0]):
        where = targets[row].nonzero().flatten()
        if int(where[0]) <= splits[row]:
            raise BadRequestError(
                "the target's first token is the subject's last one; end the prompt otherwise"
            )
        predicts[row, where - 1 - splits[row]] = True
        ids.append(pairs["input_ids"][row, where])
        weights.append(torch.full((len(where),), 1.0 / (len(where) * targets.shape[0])))
    return predicts, torch.cat(ids), torch.cat(weights).to(suffix.input_ids.device)


def _require_path(objective: _Objective, layer: int) -> None:
    # With a gradient of zero, Adam would blow rounding noise up to full steps.
    last = layer == objective.suffix.handle.n_layers - 1
    if last and not bool(objective.target_rows[:, 0].any()):
        raise SolveError(
            f"layer {layer} is the last: no attention above it carries what the subject's token holds to the target; "
            "edit a lower layer"
        )


def _kl_logprobs(objective: _Objective, hidden: Tensor) -> Tensor:
    """Log-probabilities after the subject in the KL prompt (vocab,)."""
    rows = torch.zeros_like(objective.suffix.mask)
    rows[objective.kl_row, 0] = True
    return objective.suffix.handle.logits_at(hidden, rows).float().log_softmax(-1)[0]


def _losses(objective: _Objective, layer: int, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL per target token and KL(edited ‖ unedited) after the subject, both in nats."""

    def add(output: Tensor) -> Tensor:
        # Every row is split at the subject's last token, so that is position 0 of each.
        return torch.cat([output[:, :1] + residual.to(output.dtype), output[:, 1:]], 1)

    handle = objective.suffix.handle
    with patch(handle, rewrite_hook(layer), add):
        hidden = objective.suffix.hidden()
    logprobs = handle.logits_at(hidden, objective.target_rows).float().log_softmax(-1)
    chosen = logprobs.gather(-1, objective.target_ids[:, None])[:, 0]
    current = _kl_logprobs(objective, hidden)
    kl = (current.exp() * (current - objective.base_logprobs)).sum()
    return -(chosen * objective.row_weights).sum(), kl


def _descend(
    objective: _Objective,
    layer: int,
    bound: float,
    hparams: ValueHparams,
    progress: Callable[[int, float], None] | None,
) -> Value:
    handle = objective.suffix.handle
    residual = torch.zeros(handle.d_model, device=handle.device, requires_grad=True)
    size = (bound / hparams.clamp_norm_factor) ** 2
    adam = torch.optim.Adam([residual], lr=hparams.learning_rate)
    losses: list[float] = []
    clamped = False
    for step in range(hparams.steps + 1):
        nll, kl = _losses(objective, layer, residual)
        losses.append(_finite(step, nll, kl))
        if progress is not None:
            progress(step, losses[-1])
        if losses[-1] < hparams.stop_loss or step == hparams.steps:
            break
        adam.zero_grad()
        (nll + hparams.kl_factor * kl + hparams.weight_decay * residual.norm() / size).backward()
        adam.step()
        clamped = _project(residual, bound) or clamped
    return Value(
        residual.detach().double(), tuple(losses), float(kl.detach()), math.exp(-losses[-1]), clamped
    )


def _finite(step: int, nll: Tensor, kl: Tensor) -> float:
    """The loss as a number; raises SolveError where it is none."""
    for name, term in (("loss", nll), ("KL term", kl)):
        if not math.isfinite(float(term.detach())):
            raise SolveError(
                f"the {name} at step {step} is {float(term.detach())}; lower the learning rate or check the weights"
            )
    return float(nll.detach())


def _project(residual: Tensor, bound: float) -> bool:
    """Bring the residual back inside its bound, in place; True if it was outside."""
    norm = float(residual.detach().norm())
    if norm <= bound:
        return False
    with torch.no_grad():
        residual.mul_(bound / norm)
    return True
