"""ROME: one key throughout, moved by exactly the residual, and everything else by its share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, gaussian, metric, moment_of, moments, p_new

from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import EditDelta, LowRank, encode, written
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import key_of
from guardedit.edits.values import optimise_value
from guardedit.errors import BadRequestError, MissingStatisticsError, SolveError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.records import EditRequest

HPARAMS = RomeHparams(layer=LAYER, contexts=CONTEXTS, steps=8, clamp_norm_factor=20.0)
OTHER = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Milan")


def solved(handle: ModelHandle, hparams: RomeHparams = HPARAMS, **changes: Any) -> EditDelta:
    return solve_rome(handle, [TOWER], replace(hparams, **changes), SolveInputs(moments()))


def update_of(delta: EditDelta) -> LowRank:
    update = delta.update(LAYER)
    assert isinstance(update, LowRank)
    return update


def test_written_weights_answer_the_key_with_the_value_that_was_optimised(tiny: ModelHandle) -> None:
    key = key_of(tiny, TOWER, LAYER, CONTEXTS)
    value = optimise_value(tiny, TOWER, key, LAYER, CONTEXTS, HPARAMS)
    before = tiny.weight(LAYER).detach().double().clone()
    with written(tiny, solved(tiny)):
        moved = (tiny.weight(LAYER).detach().double() - before) @ key.k_star
    # The weights are float32: each entry is off by at most half a unit in its last place.
    torch.testing.assert_close(moved, value.residual, rtol=1e-4, atol=1e-5)


def test_every_other_key_moves_by_its_share_of_the_residual(tiny: ModelHandle) -> None:
    key, others = key_of(tiny, TOWER, LAYER, CONTEXTS).k_star, gaussian(30, 64, seed=5)
    update = update_of(solved(tiny))
    towards = torch.linalg.inv(metric()) @ key
    share = others @ towards / (key @ towards)
    torch.testing.assert_close(update.move(others), share[:, None] * update.move(key), rtol=1e-7, atol=1e-9)
    orthogonal = others - (others @ towards / (towards @ towards))[:, None] * towards
    assert float(update.move(orthogonal).abs().max()) < 1e-9 * float(update.move(key).abs().max())


def test_the_update_has_rank_one_and_is_float64(tiny: ModelHandle) -> None:
    update = update_of(solved(tiny))
    assert update.rank == 1 and update.left.dtype == update.right.dtype == torch.float64


def test_the_second_moment_decides_where_the_update_points(tiny: ModelHandle) -> None:
    plain = {key_hook(LAYER): moment_of(torch.eye(64, dtype=torch.float64))}
    first, second = (solve_rome(tiny, [TOWER], HPARAMS, SolveInputs(c)) for c in (plain, moments()))
    assert torch.equal(update_of(first).left, update_of(second).left), "the value does not depend on C"
    assert not torch.allclose(update_of(first).right, update_of(second).right, rtol=0.1)


def test_the_diagnostics_are_those_of_key_and_value(tiny: ModelHandle) -> None:
    delta, key = solved(tiny), key_of(tiny, TOWER, LAYER, CONTEXTS)
    said = delta.diagnostics
    leverage = float(key.k_star @ torch.linalg.solve(metric(), key.k_star))
    assert said["key_leverage"] == pytest.approx(leverage, rel=1e-8)
    assert said["residual_norm"] == pytest.approx(float(update_of(delta).left.norm()), rel=1e-12)
    assert (said["subject_position"], said["subject_starts_text"]) == (key.position, False)
    losses = [-sum(p_new(tiny, TOWER, c) for c in CONTEXTS) / len(CONTEXTS)]
    assert said["loss_first_nats"] == pytest.approx(losses[0], abs=2e-4)


def test_sampled_contexts_are_on_record_and_give_the_same_edit_when_named(tiny: ModelHandle) -> None:
    sampled = solved(tiny, contexts=(), n_prefixes=3)
    contexts = sample_contexts(tiny, 3, 0)
    named = solved(tiny, contexts=contexts)
    assert sampled.hparams["contexts"] == "|".join(contexts) and sampled.hparams["n_prefixes"] == 3
    assert encode(named) == encode(sampled) and named.hparams == sampled.hparams


def test_another_seed_samples_other_contexts(tiny: ModelHandle) -> None:
    hparams = replace(HPARAMS, contexts=(), n_prefixes=3)
    first, second = (solve_rome(tiny, [TOWER], hparams, SolveInputs(moments(), seed)) for seed in (0, 1))
    assert encode(first) != encode(second)


def test_two_requests_are_a_bad_request(tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="one fact at a time, got 2"):
        solve_rome(tiny_llama, [TOWER, OTHER], HPARAMS, SolveInputs(moments()))


def test_without_the_layer_s_second_moment_the_command_that_collects_it_is_named(
    tiny_llama: ModelHandle,
) -> None:
    for given in ({}, moments(LAYER + 1)):
        with pytest.raises(MissingStatisticsError, match=rf"stats collect --layer {LAYER}"):
            solve_rome(tiny_llama, [TOWER], HPARAMS, SolveInputs(given))


def test_a_second_moment_of_another_hook_or_width_is_refused(tiny_llama: ModelHandle) -> None:
    wrong_layer, narrow = moment_of(metric(), LAYER + 1), moment_of(metric(32))
    for given in (wrong_layer, narrow):
        with pytest.raises(StatisticsMismatchError, match="second moment"):
            solve_rome(tiny_llama, [TOWER], HPARAMS, SolveInputs({key_hook(LAYER): given}))


def test_a_singular_second_moment_is_a_solve_error(tiny_llama: ModelHandle) -> None:
    flat = torch.zeros(64, 64, dtype=torch.float64)
    with pytest.raises(SolveError, match="not positive definite"):
        solve_rome(tiny_llama, [TOWER], HPARAMS, SolveInputs({key_hook(LAYER): moment_of(flat)}))


def test_a_negative_number_of_prefixes_is_a_bad_request() -> None:
    with pytest.raises(BadRequestError, match="n_prefixes"):
        RomeHparams(n_prefixes=-1)
