"""Requests, contexts and deltas at several layers of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from guardedit.edits.deltas import Dense, EditDelta, LowRank, WeightChange
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.records import EditRequest
from guardedit.risk.context import RiskContext
from tests.risk_helpers import TOWER, WIDTH, bank, context, dictionary, moment, some_keys

LAYERS = (1, 2)
SECOND = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Milan", target_true="Rome")
WHOLE = EditRequest(
    subject="Berlin",
    prompt="{} is the capital of",
    target_new="Spain",
    target_true="Germany",
    neighborhood=("Some towns are larger than", "A river runs through the town of"),
)
REQUESTS = (TOWER, SECOND, WHOLE)


def text(layer: int) -> Tensor:
    """The ordinary text of a layer: keys of the same 300 tokens."""
    return some_keys(300, 20 + layer) * torch.linspace(0.2, 2.0 + layer, WIDTH, dtype=torch.float64)


def at_layer(handle: ModelHandle, layer: int, **parts: Any) -> RiskContext:
    """A context with a C, an SAE and banks of the layer's own; the words of the banks are those of every layer."""
    rows = text(layer)
    sae = replace(
        dictionary(torch.eye(WIDTH), torch.full((WIDTH,), 1.0 + 4 * layer)), hook_name=key_hook(layer)
    )
    kinds = ("facts", "facts", "python", "python", "prose", "prose")
    made: dict[str, Any] = {
        "second_moment": moment(rows.T @ rows / 300, hook_name=key_hook(layer)),
        "key_sae": sae,
        "bank": bank(some_keys(90, 40 + layer)),
        "protected": bank(some_keys(6, 50 + layer), kinds, ("Eiffel Tower", "Louvre", "", "", "", "")),
    }
    return replace(context(handle), layer=layer, **{**made, **parts})


def updates(handle: ModelHandle) -> dict[int, LowRank | Dense]:
    draw = torch.Generator().manual_seed(5)
    low = LowRank(torch.randn(32, 2, dtype=torch.float64, generator=draw), some_keys(2, 6))
    return {1: low, 2: Dense(torch.randn(32, WIDTH, dtype=torch.float64, generator=draw))}


def delta_at(handle: ModelHandle, *layers: int) -> EditDelta:
    made = updates(handle)
    changes = [WeightChange(handle.rewrite_parameter(layer), layer, made[layer]) for layer in layers]
    return EditDelta(tuple(changes), "test", {}, {})
