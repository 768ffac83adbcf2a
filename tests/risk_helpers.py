"""Small worlds with known answers: hand-made second moments, dictionaries, banks and deltas on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from guardedit.edits.deltas import Dense, EditDelta, LowRank, Update, WeightChange
from guardedit.edits.keys import Key, key_of
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import SecondMoment
from guardedit.records import EditRequest
from guardedit.risk.banks import KeyBank
from guardedit.risk.context import RiskContext
from guardedit.risk.delta_view import DeltaView
from guardedit.risk.key_view import KeyView
from guardedit.saes.cards import Labels, LatentLabel, QualityCard
from guardedit.saes.checkpoints import Sae

LAYER = 1
WIDTH = 64
"""Width of a tiny model's key space."""
ZERO = "sha256:" + "0" * 64
TOWER = EditRequest(
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new="Rome",
    target_true="Paris",
)


def moment(matrix: Tensor, **changes: Any) -> SecondMoment:
    """A second moment with a given C."""
    made = SecondMoment(
        hook_name=key_hook(LAYER), matrix=matrix.double(), n_tokens=1000, n_excluded=0, upstream_digest=ZERO,
        corpus_digest=ZERO, corpus_note="made by hand", mean_norm=1.0, norm_limit=10.0,
    )  # fmt: skip
    return replace(made, **changes)


def bank(
    keys: Tensor, domains: tuple[str, ...] | None = None, subjects: tuple[str, ...] | None = None
) -> KeyBank:
    """A bank of given keys, each its own word."""
    words = tuple(f"word{i}" for i in range(len(keys)))
    return KeyBank(
        keys.float(), words, words, domains or ("prose",) * len(keys), subjects or ("",) * len(keys), ZERO
    )


def dictionary(decoder: Tensor, energy: Tensor | None = None) -> Sae:
    """An SAE whose latents are the decoder's rows, read off by their own direction, without thresholds."""
    n, width = decoder.shape
    labels = Labels(hook_name=key_hook(LAYER), latents=tuple(LatentLabel(label=f"`{i}`") for i in range(n)))
    return Sae(
        hook_name=key_hook(LAYER), d_in=width, d_sae=n, W_enc=decoder.T.float().clone(), b_enc=torch.zeros(n),
        W_dec=decoder.float(), b_dec=torch.zeros(width), threshold=torch.zeros(n),
        energy=torch.ones(n) if energy is None else energy.float(), firing_rate=torch.full((n,), 0.25),
        digest=ZERO, card=QualityCard.model_construct(), labels=labels,
    )  # fmt: skip


def unit(index: int) -> Tensor:
    """One axis of the key space, float64."""
    axis = torch.zeros(WIDTH, dtype=torch.float64)
    axis[index] = 1.0
    return axis


def some_keys(n: int, seed: int = 0) -> Tensor:
    """Random keys (n, WIDTH), float64."""
    return torch.randn(n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(handle: ModelHandle, **parts: Any) -> RiskContext:
    """C = I, no SAE and a random bank, unless `parts` say otherwise."""
    default: dict[str, Any] = {
        "second_moment": moment(torch.eye(WIDTH)),
        "key_sae": None,
        "mlp_sae": None,
        "bank": bank(some_keys(50)),
        "protected": bank(some_keys(6, 1), ("facts", "facts", "python", "python", "prose", "prose")),
    }
    return RiskContext(handle, LAYER, **{**default, **parts})


def key_view(ctx: RiskContext, key: Tensor, near: Tensor | None = None) -> KeyView:
    """A view whose key, and neighbours' keys, are planted."""
    view = KeyView(ctx, TOWER, 4)
    vars(view)["key"] = Key(key.double(), key[None], position=3, subject_starts_text=False)
    if near is not None:
        vars(view)["near_keys"] = near
    return view


def delta_of(handle: ModelHandle, update: Update, layer: int = LAYER) -> EditDelta:
    """An update as a delta."""
    return EditDelta((WeightChange(handle.rewrite_parameter(layer), layer, update),), "rome", {}, {})


def rank_one(key: Tensor, residual: Tensor, whitened: Tensor | None = None) -> LowRank:
    """The ROME update that moves `key` by `residual`; `whitened` is C⁻¹k, the key itself for C = I."""
    towards = key.double() if whitened is None else whitened.double()
    return LowRank(residual.double()[:, None], (towards / (towards @ key.double()))[None])


def delta_view(ctx: RiskContext, update: LowRank | Dense, near: Tensor | None = None) -> DeltaView:
    """A delta seen with planted neighbours."""
    view = key_view(ctx, unit(0), near if near is not None else unit(1)[None])
    return DeltaView(ctx, (view,), delta_of(ctx.handle, update))


def close(value: float, rel: float = 1e-6) -> object:
    """Equal but for rounding."""
    return pytest.approx(value, rel=rel, abs=1e-9)


def world(handle: ModelHandle) -> tuple[RiskContext, EditDelta]:
    """A context with an SAE and the tower's ROME delta in it."""
    text = some_keys(400, 11)
    ctx = context(handle, second_moment=moment(text.T @ text / 400), key_sae=dictionary(torch.eye(WIDTH)))
    k = key_of(handle, TOWER, LAYER, ("",)).k_star
    residual = 3 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return ctx, delta_of(handle, rank_one(k, residual, ctx.second_moment.solve(k)))
