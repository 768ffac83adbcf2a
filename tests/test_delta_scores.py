"""Scores of the solved update, against what a few lines of linear algebra say."""

from __future__ import annotations

import math

import pytest
import torch

from guardedit.edits.deltas import Dense, LowRank
from guardedit.models.handle import ModelHandle
from guardedit.risk import delta_stage, key_stage
from tests.risk_helpers import (
    LAYER,
    WIDTH,
    bank,
    close,
    context,
    delta_view,
    dictionary,
    key_view,
    moment,
    rank_one,
    some_keys,
    unit,
)

RESIDUAL = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_rank_one_leakage_is_the_residual_over_the_leverage_and_the_mean_move_over_text(
    tiny_llama: ModelHandle,
) -> None:
    text = some_keys(300) * torch.linspace(0.2, 3.0, WIDTH, dtype=torch.float64)
    c = text.T @ text / 300
    key = some_keys(1, 5)[0]
    ctx = context(tiny_llama, second_moment=moment(c))
    update = rank_one(key, RESIDUAL, torch.linalg.solve(c, key))
    leaked = delta_stage.leakage(delta_view(ctx, update)).value
    assert leaked == close(float(RESIDUAL @ RESIDUAL) * key_stage.key_leakage(key_view(ctx, key)).value)
    assert leaked == close(float(update.move(text).square().sum(1).mean()))


def test_a_dense_update_scores_as_its_low_rank_twin(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, key_sae=dictionary(torch.eye(WIDTH)))
    low = LowRank(torch.randn(32, 3, dtype=torch.float64), some_keys(3, 2))
    pair = [delta_view(ctx, update) for update in (low, Dense(low.dense()))]
    for name, rule in delta_stage.DELTA_SCORES.items():
        first, second = (rule.measure(view).value for view in pair)
        assert first == pytest.approx(second, rel=1e-4), name


def test_the_whole_weight_as_update_has_share_and_ratio_one(tiny: ModelHandle) -> None:
    text = some_keys(200)
    ctx = context(tiny, second_moment=moment(text.T @ text / 200))
    view = delta_view(ctx, Dense(tiny.weight(LAYER).detach().double()))
    assert delta_stage.leakage_share(view).value == close(1.0, 1e-5)
    assert delta_stage.delta_norm_ratio(view).value == close(1.0, 1e-5)


def test_the_tail_is_the_99th_percentile_of_moves(tiny_llama: ModelHandle) -> None:
    sizes = torch.linspace(0, 1, 101, dtype=torch.float64)
    ctx = context(tiny_llama, bank=bank(sizes[:, None] * unit(0)))
    view = delta_view(ctx, rank_one(unit(0), RESIDUAL))
    expected = 0.99 * float(RESIDUAL.norm()) / math.sqrt(ctx.output_energy)
    assert delta_stage.leakage_tail(view).value == close(expected, 1e-5)


def test_near_interference_is_zero_across_and_the_full_move_along_the_key(tiny_llama: ModelHandle) -> None:
    ctx, update = context(tiny_llama), rank_one(unit(0), RESIDUAL)
    across = delta_stage.near_interference(delta_view(ctx, update, torch.stack([unit(1), unit(2)])))
    along = delta_stage.near_interference(delta_view(ctx, update, torch.stack([unit(0), unit(0)])))
    assert across.value == close(0.0)
    assert along.value == close(float(RESIDUAL @ RESIDUAL) / ctx.output_energy)


def test_protected_facts_about_the_edited_subject_do_not_count(tiny_llama: ModelHandle) -> None:
    protected = bank(torch.stack([unit(0), unit(1)]), ("facts", "facts"), ("eiffel tower", "Colosseum"))
    view = delta_view(context(tiny_llama, protected=protected), rank_one(unit(0), RESIDUAL))
    measured = delta_stage.DELTA_SCORES["protected_interference_facts"].measure(view)
    assert (measured.value, measured.n) == (close(0.0), 1)


def test_a_planted_latent_carries_all_the_leak(tiny_llama: ModelHandle) -> None:
    energy = torch.linspace(0.5, 2.0, WIDTH)
    ctx = context(
        tiny_llama, key_sae=dictionary(torch.eye(WIDTH), energy), second_moment=moment(torch.diag(energy))
    )
    view = delta_view(ctx, rank_one(unit(3), RESIDUAL))
    risk = delta_stage.delta_risk(view)
    assert (risk.latents[0].latent, risk.latents[0].label) == (3, "`3`")
    assert risk.latents[0].share == close(1.0)
    assert delta_stage.latent_leak_count(view).value == close(1.0)
    assert delta_stage.latent_leak(view).value == close(delta_stage.leakage(view).value)


def test_a_leak_spread_over_two_latents_counts_two(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, key_sae=dictionary(torch.eye(WIDTH)))
    view = delta_view(ctx, rank_one(unit(3) + unit(4), RESIDUAL))
    assert delta_stage.latent_leak_count(view).value == close(2.0)


def test_a_dictionary_explains_the_leak_in_the_directions_it_has(tiny_llama: ModelHandle) -> None:
    half = torch.eye(WIDTH)
    half[4] = 0
    planted = bank(torch.stack([unit(3), unit(4)] * 5))
    for key, share in ((unit(3), 1.0), (unit(4), 0.0), (unit(3) + unit(4), 0.5)):
        view = delta_view(
            context(tiny_llama, key_sae=dictionary(half), bank=planted), rank_one(key, RESIDUAL)
        )
        assert delta_stage.leakage_explained(view).value == close(share, 1e-5)


def test_the_explained_share_is_clipped_with_the_raw_value_in_the_remark(tiny_llama: ModelHandle) -> None:
    sae = dictionary(torch.eye(WIDTH))
    sae.W_dec.mul_(-5)
    planted = bank(torch.stack([unit(3)] * 4))
    measured = delta_stage.leakage_explained(
        delta_view(context(tiny_llama, key_sae=sae, bank=planted), rank_one(unit(3), RESIDUAL))
    )
    assert (measured.value, measured.reason) == (-1.0, "raw value -5")
