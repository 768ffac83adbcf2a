"""EMMET and MEMIT as editors: one solver for all, equal where theory says so, and a band that ends at its target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from closed_form_helpers import FACTS, constrained, penalised, stacked, wanted_of
from edits_helpers import CONTEXTS, LAYER, TOWER, metric, moment_of, twin
from torch import Tensor

from guardedit.editors.emmet import EmmetHparams, emmet, solve_emmet
from guardedit.editors.located import find_wanted
from guardedit.editors.memit import MemitHparams, memit, solve_memit
from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.deltas import EditDelta, encode, rehearsed, written
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import last_token_of, subject_span
from guardedit.edits.spreading import Wanted
from guardedit.errors import BadRequestError, MissingStatisticsError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook, record
from guardedit.records import EditRequest

BAND = (0, 1, 2)
INPUTS = SolveInputs({key_hook(layer): moment_of(metric(seed=layer + 3), layer) for layer in range(4)})
SHORT: dict[str, Any] = {"layer": LAYER, "contexts": CONTEXTS, "steps": 6, "clamp_norm_factor": 20.0}


def c_of(layer: int = LAYER) -> Tensor:
    return INPUTS.second_moments[key_hook(layer)].matrix


def close(found: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-7) -> None:
    """Equal up to rounding, relative to the largest entry."""
    wide = torch.as_tensor(expected)
    assert float((found - wide).abs().max()) <= tolerance * float(wide.abs().max())


def hidden(handle: ModelHandle, wanted: Wanted) -> Tensor:
    """Residual stream behind the value layer at each subject's end, one row at a time (d_model, batch)."""
    hook, columns = f"blocks.{wanted.layer}.hook_resid_post", []
    for request in wanted.requests:
        states = []
        for context in wanted.contexts:
            row = handle.encode([context + request.filled])
            at = last_token_of(row["offsets"], row["attention_mask"], [subject_span(request, context)])[0]
            with torch.no_grad(), record(handle, [hook]) as seen:
                handle.hidden(row["input_ids"], row["attention_mask"])
            states.append(seen[hook][0, at].double())
        columns.append(torch.stack(states).mean(0))
    return torch.stack(columns, 1)


# -- one layer: the same values, three solvers


def test_rome_is_emmet_with_one_request(tiny: ModelHandle) -> None:
    rome = solve_rome(tiny, [TOWER], RomeHparams(**SHORT), INPUTS)
    found = solve_emmet(tiny, [TOWER], EmmetHparams(**SHORT), INPUTS)
    assert encode(rome) == encode(found)
    assert rome.diagnostics == found.diagnostics


def test_emmet_meets_every_value_and_is_the_constrained_least_squares(tiny: ModelHandle) -> None:
    wanted = wanted_of(tiny)
    delta = emmet(tiny, wanted, EmmetHparams(layer=LAYER), INPUTS)
    update = delta.update(LAYER).dense()
    assert float((update @ stacked(wanted) - wanted.residuals).norm() / wanted.residuals.norm()) < 1e-8
    close(update, constrained(stacked(wanted), wanted.residuals, c_of()))
    assert (
        delta.diagnostics["gram_rank"] == len(FACTS) and float(delta.diagnostics["missed_share"] or 0) < 1e-8
    )


@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_memit_on_one_layer_is_the_published_normal_equation(tiny: ModelHandle, ridge: float) -> None:
    wanted = wanted_of(tiny)
    delta = memit(tiny, wanted, MemitHparams(layer=LAYER, ridge=ridge), INPUTS)
    expected = torch.as_tensor(penalised(stacked(wanted), wanted.residuals, c_of(), ridge))
    close(delta.update(LAYER).dense(), expected)
    left = expected @ stacked(wanted) - wanted.residuals
    assert delta.diagnostics["missed_share"] == pytest.approx(
        float(left.norm() / wanted.residuals.norm()), rel=1e-6
    )


def test_memit_tends_to_emmet_for_a_small_ridge_and_to_nothing_for_a_large_one(tiny: ModelHandle) -> None:
    wanted = wanted_of(tiny)
    exact = emmet(tiny, wanted, EmmetHparams(layer=LAYER), INPUTS).update(LAYER).dense()
    small, large = (
        memit(tiny, wanted, MemitHparams(layer=LAYER, ridge=ridge), INPUTS).update(LAYER).dense()
        for ridge in (1e-9, 1e9)
    )
    close(small, exact, 1e-6)
    assert float(large.norm()) < 1e-4 * float(exact.norm())


def test_emmet_s_ridge_is_relative_to_the_keys_leverage(tiny: ModelHandle) -> None:
    wanted = wanted_of(tiny)
    keys = stacked(wanted).numpy()
    leverage = float(np.diag(keys.T @ np.linalg.solve(c_of().numpy(), keys)).mean())
    eased = emmet(tiny, wanted, EmmetHparams(layer=LAYER, ridge=0.3), INPUTS)
    close(eased.update(LAYER).dense(), penalised(stacked(wanted), wanted.residuals, c_of(), 0.3 * leverage))


def test_values_found_once_serve_every_editor(tiny_llama: ModelHandle) -> None:
    for hparams, inner, outer in (
        (EmmetHparams(**SHORT), emmet, solve_emmet),
        (MemitHparams(**SHORT, layers=(0, LAYER)), memit, solve_memit),
    ):
        wanted = find_wanted(tiny_llama, FACTS, RomeHparams(**SHORT), INPUTS)
        assert encode(inner(tiny_llama, wanted, hparams, INPUTS)) == encode(
            outer(tiny_llama, FACTS, hparams, INPUTS)
        )


def test_written_weights_answer_every_key_with_its_value(tiny: ModelHandle) -> None:
    wanted = find_wanted(tiny, FACTS, EmmetHparams(**SHORT), INPUTS)
    delta = emmet(tiny, wanted, EmmetHparams(**SHORT), INPUTS)
    before = tiny.weight(LAYER).detach().double().clone()
    with written(tiny, delta):
        moved = (tiny.weight(LAYER).detach().double() - before) @ stacked(wanted)
    # The weights are float32: each entry is off by at most half a unit in its last place.
    torch.testing.assert_close(moved, wanted.residuals, rtol=1e-4, atol=1e-5)
    assert delta.diagnostics["facts"] == len(FACTS)


@pytest.mark.parametrize("editor", ["emmet", "memit"])
def test_the_order_of_the_requests_does_not_matter(tiny_llama: ModelHandle, editor: str) -> None:
    solve, hparams = {
        "emmet": (solve_emmet, EmmetHparams(**SHORT)),
        "memit": (solve_memit, MemitHparams(**SHORT, layers=(0, LAYER), ridge=0.5)),
    }[editor]
    first, second = (solve(tiny_llama, facts, hparams, INPUTS) for facts in (FACTS, FACTS[::-1]))
    for layer in first.layers:
        # Values are optimised in float32, in rows of another order.
        close(first.update(layer).dense(), second.update(layer).dense(), 1e-3)


# -- a band of layers


def solved_band(handle: ModelHandle, wanted: Wanted, ridge: float = 1e-6) -> EditDelta:
    return memit(handle, wanted, MemitHparams(layer=BAND[-1], layers=BAND, ridge=ridge), INPUTS)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_band_ends_at_its_target(family: str, request: pytest.FixtureRequest) -> None:
    """‖z − h‖ with all layers' updates in place, measured on the model: the loop's shares add up."""
    handle: ModelHandle = request.getfixturevalue(family)
    wanted = wanted_of(handle, layer=BAND[-1])
    target = hidden(handle, wanted) + wanted.residuals
    delta = solved_band(handle, wanted)
    assert delta.layers == BAND
    with rehearsed(handle, delta):
        left = target - hidden(handle, wanted)
    # The forward pass is float32.
    assert float(left.norm() / wanted.residuals.norm()) < 1e-4
    assert float(delta.diagnostics["missed_share"] or 0) < 1e-4
    with rehearsed(handle, replace(delta, changes=delta.changes[:-1])):
        half = target - hidden(handle, wanted)
    assert float(half.norm() / wanted.residuals.norm()) > 0.1, "the lower layers alone do not get there"


def test_each_layer_solves_its_share_of_what_is_left_with_those_below_in_place(
    tiny_llama: ModelHandle,
) -> None:
    """The loop of the paper, run by hand on a copy whose weights are really written."""
    own, ridge = twin(tiny_llama), 0.5
    wanted = wanted_of(own, layer=BAND[-1])
    delta = solved_band(own, wanted, ridge)
    target = hidden(own, wanted) + wanted.residuals
    for number, layer in enumerate(BAND):
        keys = stacked(wanted_of(own, layer=layer))
        share = (target - hidden(own, wanted)) / (len(BAND) - number)
        expected = torch.as_tensor(penalised(keys, share, c_of(layer), ridge))
        # Written weights and hidden states are float32.
        close(delta.update(layer).dense(), expected, 1e-4)
        with torch.no_grad():
            own.weight(layer).add_(delta.update(layer).dense())


def test_a_band_of_one_layer_is_that_layer_alone(tiny: ModelHandle) -> None:
    wanted = wanted_of(tiny)
    alone, named = (
        memit(tiny, wanted, MemitHparams(layer=LAYER, layers=layers), INPUTS) for layers in ((), (LAYER,))
    )
    assert encode(alone) == encode(named) and alone.hparams == named.hparams
    assert alone.hparams["layers"] == str(LAYER)


def test_a_norm_behind_the_mlp_allows_one_layer_only(tiny_handles: dict[str, ModelHandle]) -> None:
    handle = tiny_handles["gemma2"]
    wanted = wanted_of(handle, layer=BAND[-1])
    with pytest.raises(BadRequestError, match=r"behind its MLP.*Edit layer 2 alone"):
        solved_band(handle, wanted)
    alone = memit(handle, wanted, MemitHparams(layer=BAND[-1], ridge=1e-6), INPUTS)
    assert alone.layers == BAND[-1:] and float(alone.diagnostics["missed_share"] or 0) < 1e-4


# -- what is refused


def test_more_requests_than_dimensions_have_no_exact_solution(tiny_llama: ModelHandle) -> None:
    many = [
        EditRequest(subject=f"Tower {number}", prompt="The {} is in", target_new="Rome")
        for number in range(65)
    ]
    with pytest.raises(BadRequestError, match=r"65 requests are more than the 64 dimensions.*use memit"):
        solve_emmet(tiny_llama, many, EmmetHparams(**SHORT), INPUTS)
    wanted = wanted_of(tiny_llama, tuple(many), contexts=("",))
    with pytest.raises(BadRequestError, match="65 requests"):
        emmet(tiny_llama, wanted, EmmetHparams(layer=LAYER), INPUTS)
    update = memit(tiny_llama, wanted, MemitHparams(layer=LAYER, ridge=0.1), INPUTS).update(LAYER).dense()
    close(update, penalised(stacked(wanted), wanted.residuals, c_of(), 0.1))


def test_emmet_refuses_dependent_keys_and_memit_shares_between_them(tiny_llama: ModelHandle) -> None:
    wanted = wanted_of(tiny_llama)
    key = replace(wanted.keys[3], k_star=wanted.keys[0].k_star + wanted.keys[1].k_star)
    wanted = replace(wanted, keys=(*wanted.keys[:3], key))
    with pytest.raises(SolveError, match="4 keys span only 3"):
        emmet(tiny_llama, wanted, EmmetHparams(layer=LAYER), INPUTS)
    delta = memit(tiny_llama, wanted, MemitHparams(layer=LAYER, ridge=0.1), INPUTS)
    assert delta.diagnostics["gram_rank"] == 3


@pytest.mark.parametrize(
    "solve, hparams", [(solve_emmet, EmmetHparams(**SHORT)), (solve_memit, MemitHparams(**SHORT))]
)
def test_contradictions_and_one_key_for_two_facts_are_refused(
    tiny_llama: ModelHandle, solve: Any, hparams: Any
) -> None:
    for other, said in (
        (FACTS[1].model_copy(update={"target_new": "Milan"}), "contradict"),
        (FACTS[2].model_copy(update={"prompt": "{} worked in"}), "sees one key"),
    ):
        with pytest.raises(BadRequestError, match=said):
            solve(tiny_llama, [*FACTS, other], hparams, INPUTS)


def test_every_layer_of_a_band_needs_its_second_moment(tiny_llama: ModelHandle) -> None:
    some = SolveInputs({name: one for name, one in INPUTS.second_moments.items() if name != key_hook(0)})
    with pytest.raises(MissingStatisticsError, match="stats collect --layer 0"):
        solve_memit(tiny_llama, FACTS, MemitHparams(**SHORT, layers=(0, LAYER)), some)


@pytest.mark.parametrize("layers", [(1, 0), (0, 0, 1), (0,), (0, 2), [0, 1], ("0", 1), (-1, 1), (True, 1), 1])
def test_a_band_ascends_to_the_value_layer(layers: Any) -> None:
    with pytest.raises(BadRequestError, match="layers are"):
        MemitHparams(layer=1, layers=layers)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), "100", None])
def test_memit_needs_a_ridge(ridge: Any) -> None:
    with pytest.raises(BadRequestError, match="ridge"):
        MemitHparams(ridge=ridge)


@pytest.mark.parametrize("ridge", [-1.0, float("inf"), "0"])
def test_emmet_s_ridge_is_a_number(ridge: Any) -> None:
    with pytest.raises(BadRequestError, match="ridge"):
        EmmetHparams(ridge=ridge)
