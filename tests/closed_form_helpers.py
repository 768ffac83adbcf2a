"""Plain numpy solutions that the solvers are compared with, and small batches of facts for tiny models."""

from __future__ import annotations

import numpy as np
import torch
from edits_helpers import LAYER, gaussian, metric
from torch import Tensor

from guardedit.edits.keys import keys_of
from guardedit.edits.spreading import Wanted
from guardedit.edits.values import Value
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

FACTS = (
    EditRequest(subject="Eiffel Tower", prompt="The {} is located in the city of", target_new="Rome"),
    EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Paris"),
    EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="London"),
    EditRequest(subject="the song", prompt="The language of {} is", target_new="French"),
)
EARLIER = (
    EditRequest(subject="Berlin", prompt="{} is the capital of", target_new="Spain"),
    EditRequest(subject="Alan Turing", prompt="{} was born in", target_new="Rome"),
)


def problem(batch: int, d_in: int = 12, d_out: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (d_in, batch), residuals (d_out, batch) and C."""
    return gaussian(d_in, batch, seed=seed), gaussian(d_out, batch, seed=seed + 50), metric(d_in, seed)


def constrained(keys: Tensor, residuals: Tensor, c: Tensor) -> np.ndarray:
    """Row by row: minimise w C wᵀ subject to Kᵀw = r, by its KKT system."""
    k, r, (d_in, batch) = keys.numpy(), residuals.numpy(), keys.shape
    system = np.block([[2 * c.numpy(), k], [k.T, np.zeros((batch, batch))]])
    right = np.concatenate([np.zeros((d_in, r.shape[0])), r.T])
    return np.linalg.solve(system, right)[:d_in].T


def penalised(keys: Tensor, residuals: Tensor, c: Tensor, ridge: float) -> np.ndarray:
    """R Kᵀ (λC + KKᵀ)⁻¹, as MEMIT is published."""
    k = keys.numpy()
    return np.linalg.solve(k @ k.T + ridge * c.numpy(), k @ residuals.numpy().T).T


def wanted_of(
    handle: ModelHandle,
    requests: tuple[EditRequest, ...] = FACTS,
    layer: int = LAYER,
    contexts: tuple[str, ...] = ("", "Berlin. "),
    size: float = 0.5,
) -> Wanted:
    """Real keys and values at random: what a solver makes of them does not depend on where they came from."""
    residuals = size * gaussian(len(requests), handle.d_model, seed=3)
    values = tuple(Value(row, (2.0, 1.0), 0.0, 0.5, False) for row in residuals)
    keys = keys_of(handle, requests, layer, contexts)
    return Wanted(requests, contexts, layer, keys, values)


def stacked(wanted: Wanted) -> Tensor:
    """Its keys, a column each."""
    return torch.stack([key.k_star for key in wanted.keys], 1)
