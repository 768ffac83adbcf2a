"""What tests of edits share: one request, second moments by hand, random updates, small-type twins of a model."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from guardedit.edits.deltas import Dense, EditDelta, LowRank, Update, WeightChange, change_of, record_of
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.second_moment import SecondMoment
from guardedit.records import DeltaRecord, EditRequest

LAYER = 1
ZERO = "sha256:" + "0" * 64
TOWER = EditRequest(
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new="Rome",
    target_true="Paris",
)
CONTEXTS = ("", "It is well known that writers work. ", "Berlin. ")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metric(width: int = 64, seed: int = 7) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues from 0.01 to 10."""
    axes = torch.linalg.qr(gaussian(width, width, seed=seed))[0]
    return axes @ torch.diag(torch.logspace(-2, 1, width, dtype=torch.float64)) @ axes.T


def moment_of(matrix: Tensor, layer: int = LAYER) -> SecondMoment:
    """A second moment with a given C."""
    return SecondMoment(
        hook_name=key_hook(layer), matrix=(matrix + matrix.T) / 2, n_tokens=1000, n_excluded=0,
        upstream_digest=ZERO, corpus_digest=ZERO, corpus_note="made by hand", mean_norm=1.0, norm_limit=10.0,
    )  # fmt: skip


def moments(layer: int = LAYER) -> dict[str, SecondMoment]:
    """What an editor is given for a tiny model."""
    return {key_hook(layer): moment_of(metric(), layer)}


def low_rank(size: float = 0.3, seed: int = 0, rank: int = 1) -> LowRank:
    """A random update of a tiny model's rewrite module, large enough to be seen."""
    return LowRank(size * gaussian(32, rank, seed=seed), size * gaussian(rank, 64, seed=seed + 1))


def delta_of(handle: ModelHandle, update: Update, *more: Update, layer: int = LAYER) -> EditDelta:
    """A delta of updates of consecutive layers from `layer` on."""
    changes = [
        WeightChange(handle.rewrite_parameter(at), at, one) for at, one in enumerate((update, *more), layer)
    ]
    return EditDelta(tuple(changes), "test", {"layer": layer}, {"steps": 3})


def twin(handle: ModelHandle, dtype: torch.dtype = torch.float32) -> ModelHandle:
    """A copy with weights of its own, cast to `dtype`."""
    return replace(handle, model=copy.deepcopy(handle.model).to(dtype))


def p_new(handle: ModelHandle, request: EditRequest = TOWER, context: str = "") -> float:
    """Mean log-probability in nats of a token of the new target."""
    return float(handle.token_logprobs([context + request.filled], [request.target_new])[0].mean())


def everything(handle: ModelHandle, size: float = 0.05) -> EditDelta:
    """A delta of every parameter: embeddings, norms, biases and attention as well as rewrite modules."""
    changes = []
    for seed, (name, _) in enumerate(handle.model.named_parameters()):
        shape = handle.oriented(name).shape
        update: Update = Dense(size * gaussian(*shape, seed=seed).float())
        if seed % 3 == 0 and len(shape) == 2:
            update = LowRank(size * gaussian(shape[0], 2, seed=seed), gaussian(2, shape[1], seed=seed + 1))
        changes.append(change_of(handle, name, update))
    return EditDelta(tuple(changes), "test", {}, {})


UPDATES = {
    "rank one": low_rank(),
    "rank three": low_rank(rank=3),
    "dense": Dense(0.1 * gaussian(32, 64).float()),
}
SMALL = [torch.bfloat16, torch.float16]


def record_for(delta: EditDelta, handle: ModelHandle) -> DeltaRecord:
    return record_of(handle, delta, model_digest=handle.digest(), statistics_digests={})
