"""Prompts with their targets behind them, tokenised once: what every method that trains on target tokens reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

ScoreAt = Literal["own", "prompt_end"]
"""Where a target's token is scored: at its own position, all earlier ones before it; or at the prompt's last one."""
ROWS = 64
"""Rows a forward pass; more requests take more passes, not more memory."""


@dataclass(frozen=True, eq=False)
class TargetRows:
    """Some rows of one loss."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    predicts: Bool[Tensor, "batch seq"]
    """Positions whose next token is scored."""
    which: Int[Tensor, " n_targets"]
    """For each target token, which of those positions scores it."""
    target_ids: Int[Tensor, " n_targets"]
    weights: Float[Tensor, " n_targets"]
    """Of each target token in the loss; they add up to 1 over all rows of a loss."""


def target_rows(
    handle: ModelHandle, requests: Sequence[EditRequest], contexts: Sequence[str], score_at: ScoreAt = "own"
) -> tuple[TargetRows, ...]:
    """Every request behind every context. At their own positions all target tokens weigh the same; at the prompt's
    end all rows do, as published for FT-L.

    Raises BadRequestError for no requests, or a prompt that has no token before the target.
    """
    if not requests:
        raise BadRequestError("no requests to solve; give at least one")
    pairs = [(context + request.filled, request.target_new) for request in requests for context in contexts]
    raw = [_rows(handle, pairs[start : start + ROWS], score_at) for start in range(0, len(pairs), ROWS)]
    total = sum(float(rows.weights.sum()) for rows in raw)
    return tuple(TargetRows(**{**vars(rows), "weights": rows.weights / total}) for rows in raw)


def _rows(handle: ModelHandle, pairs: Sequence[tuple[str, str]], score_at: ScoreAt) -> TargetRows:
    batch = handle.encode_pairs([prompt for prompt, _ in pairs], [target for _, target in pairs])
    mask = batch["target_mask"]
    if bool(mask[:, 0].any()):
        raise BadRequestError("a target needs at least one token before it; give a non-empty prompt")
    row_of = mask.nonzero()[:, 0]
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = mask[:, 1:]
    which = torch.arange(len(row_of), device=mask.device)
    weights = torch.ones(len(row_of), device=mask.device)
    if score_at == "prompt_end":
        # What stands behind a position does not reach it, so the row with its target serves as the bare prompt.
        predicts &= predicts.cumsum(1) == 1
        which, weights = row_of, 1.0 / mask.sum(1)[row_of]
    ids = batch["input_ids"]
    return TargetRows(ids, batch["attention_mask"], predicts, which, ids[mask], weights)


def target_nll(
    handle: ModelHandle, rows: TargetRows, hidden: Float[Tensor, "batch seq d_model"]
) -> Float[Tensor, ""]:
    """These rows' part of the mean negative log-likelihood of a target token, in nats."""
    logprobs = handle.logits_at(hidden, rows.predicts).float().log_softmax(-1)
    return -(logprobs[rows.which, rows.target_ids] * rows.weights).sum()


def parts_of(handle: ModelHandle, batches: Sequence[TargetRows]) -> list[Callable[[], Tensor]]:
    """The loss of each batch under the handle's own weights."""

    def part(rows: TargetRows) -> Callable[[], Tensor]:
        return lambda: target_nll(handle, rows, handle.hidden(rows.input_ids, rows.attention_mask))

    return [part(rows) for rows in batches]
