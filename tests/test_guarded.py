"""Guarded values: the edit holds, and what the model says about the subject moves less than under ROME."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, moments, p_new

from guardedit.editors.guarded import GuardedHparams, solve_guarded
from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.edits.essence import OPENINGS, essence_texts
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import keys_of
from guardedit.edits.objective import Fact, make_objective
from guardedit.edits.rewordings import rewordings
from guardedit.edits.values import Keep, ValueHparams, optimise_values
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

SMALL: dict[str, Any] = {
    "layer": LAYER, "contexts": ("",), "steps": 150, "clamp_norm_factor": 50.0,
}  # fmt: skip
ABOUT = (("The Eiffel Tower is in France and",),)


def reachable(handle: ModelHandle) -> float:
    """A loss half-way between the unedited model's and the best that a free value reaches."""
    keys = keys_of(handle, [TOWER], LAYER, ("",))
    losses = optimise_values(handle, [TOWER], keys, LAYER, ("",), ValueHparams(clamp_norm_factor=50.0))[
        0
    ].losses
    return (losses[0] + min(losses)) / 2


def settings(handle: ModelHandle) -> dict[str, Any]:
    return {**SMALL, "hold_loss": reachable(handle), "stop_loss": reachable(handle)}


def guarded(handle: ModelHandle) -> EditDelta:
    return solve_guarded(handle, [TOWER], GuardedHparams(**settings(handle)), SolveInputs(moments()))


def test_the_value_holds_like_rome_s_and_moves_what_is_kept_less(tiny: ModelHandle) -> None:
    """At the same likelihood of the target, the texts about the subject move less than under the published loss."""
    keys, limit = keys_of(tiny, [TOWER], LAYER, ("",)), reachable(tiny)
    hparams = ValueHparams(steps=150, clamp_norm_factor=50.0, stop_loss=limit)
    rome = optimise_values(tiny, [TOWER], keys, LAYER, ("",), hparams)[0]
    kept = optimise_values(tiny, [TOWER], keys, LAYER, ("",), hparams, keep=Keep(ABOUT, hold_loss=limit))[0]
    objective = make_objective(tiny, [Fact(TOWER, ("",), hparams.kl_prompt, kept=ABOUT[0])], LAYER)
    with torch.no_grad():
        plain = objective.losses(rome.residual.float()[None])
        held = objective.losses(kept.residual.float()[None])
    assert -math.log(kept.p_new) <= limit + 1e-4 and -math.log(rome.p_new) <= limit
    assert float(held.kept[0]) == pytest.approx(kept.kept_nats, rel=1e-3)
    assert float(held.kept[0]) < 0.97 * float(plain.kept[0])


def test_the_editor_s_value_holds_and_the_edit_makes_the_target_likelier(tiny: ModelHandle) -> None:
    delta, before = guarded(tiny), p_new(tiny)
    assert float(delta.diagnostics["p_new_at_solution"] or 0) >= math.exp(-reachable(tiny)) * (1 - 1e-4)
    with rehearsed(tiny, delta):
        assert p_new(tiny) > before + 0.05


def test_its_diagnostics_say_what_was_kept_and_how_hard(tiny_llama: ModelHandle) -> None:
    delta = guarded(tiny_llama)
    assert delta.editor == "guarded"
    assert float(delta.diagnostics["kept_nats"] or 0) > 0 and float(delta.diagnostics["keep_weight"] or 0) > 0
    assert delta.hparams["keep_texts"] == 5


def test_the_value_is_the_best_iterate_that_holds(tiny: ModelHandle) -> None:
    """More steps can only improve the kept term, as the best one that holds is remembered."""
    keys, limit = keys_of(tiny, [TOWER], LAYER, ("",)), reachable(tiny)
    keep = Keep(ABOUT, hold_loss=limit, patience=100)
    found = [
        optimise_values(
            tiny, [TOWER], keys, LAYER, ("",), ValueHparams(steps=steps, clamp_norm_factor=50.0), keep=keep
        )[0]
        for steps in (30, 60)
    ]
    for value in found:
        assert -math.log(value.p_new) <= limit + 1e-4
    assert found[1].kept_nats <= found[0].kept_nats
    assert found[1].losses[: len(found[0].losses)] == found[0].losses


def test_where_nothing_holds_the_closest_is_taken(tiny_llama: ModelHandle) -> None:
    keys = keys_of(tiny_llama, [TOWER], LAYER, ("",))
    keep = Keep(ABOUT, hold_loss=1e-6)
    found = optimise_values(tiny_llama, [TOWER], keys, LAYER, ("",), ValueHparams(steps=6), keep=keep)[0]
    assert -math.log(found.p_new) == pytest.approx(min(found.losses), abs=1e-6)


def test_essence_texts_are_about_the_subject_and_not_about_the_targets(tiny: ModelHandle) -> None:
    other = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="a", target_true="e")
    texts = essence_texts(tiny, [TOWER, other], 6, 12, seed=3)
    assert len(texts[0]) >= 4 and all(
        "the Eiffel Tower" in text or "The Eiffel Tower" in text for text in texts[0]
    )
    assert all("Rome" not in t and "Paris" not in t for t in texts[0])
    # Any text with an "a" or "e" beyond the subject's name speaks of these targets, and the openings all do.
    assert texts[1] == ()
    assert texts == essence_texts(tiny, [TOWER, other], 6, 12, seed=3)
    assert not any(opening.startswith("{}") for opening in OPENINGS)


def test_a_batch_of_guarded_values_is_each_one_s_own(tiny: ModelHandle) -> None:
    requests = [TOWER, EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Paris")]
    hparams = ValueHparams(steps=15, clamp_norm_factor=50.0, keep_texts=3, hold_loss=5.0)
    texts = essence_texts(tiny, requests, 3, 10, seed=0)
    keys = keys_of(tiny, requests, LAYER, CONTEXTS)
    both = optimise_values(tiny, requests, keys, LAYER, CONTEXTS, hparams, keep=Keep(texts, hold_loss=5.0))
    for index, request in enumerate(requests):
        alone = optimise_values(
            tiny, [request], keys[index : index + 1], LAYER, CONTEXTS, hparams,
            keep=Keep(texts[index : index + 1], hold_loss=5.0),
        )[0]  # fmt: skip
        assert float((both[index].residual - alone.residual).norm()) < 5e-3 * float(alone.residual.norm())
        assert both[index].keep_weight == pytest.approx(alone.keep_weight)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{} lies in the city of", ("{} the city of", "{}, of", "{} lies the of", "About {}: lies in the city of")),
        ("The capital of {} is", ("The capital of {}, is", "About {}: is")),
        ("We went to {}", ()),
        ("The {}'s owner is", ()),
    ],
)  # fmt: skip
def test_rewordings_leave_words_out_and_keep_the_blank(prompt: str, expected: tuple[str, ...]) -> None:
    found = rewordings(prompt)
    assert found == expected
    assert all(text.count("{}") == 1 and text != prompt for text in found)


def test_a_reworded_value_answers_to_the_rewordings_too(tiny: ModelHandle) -> None:
    """Mean loss over the rewordings, from the objective: lower than that of a value that never saw them."""
    keys = keys_of(tiny, [TOWER], LAYER, ("",))
    objective = make_objective(tiny, [Fact(TOWER, (), "{} is a", rewordings=rewordings(TOWER.prompt))], LAYER)
    nll = []
    for reword in (False, True):
        hparams = ValueHparams(steps=25, clamp_norm_factor=50.0, stop_loss=0.0, reword=reword)
        value = optimise_values(tiny, [TOWER], keys, LAYER, ("",), hparams)[0]
        with torch.no_grad():
            nll.append(float(objective.losses(value.residual.float()[None]).nll[0]))
    assert nll[1] < nll[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reword", "yes"),
        ("keep_texts", -1),
        ("keep_texts", 2.5),
        ("keep_length", 0),
        ("keep_weight", 0),
        ("hold_loss", "x"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: object) -> None:
    with pytest.raises(BadRequestError, match=name):
        replace(GuardedHparams(layer=1), **{name: value})  # type: ignore[arg-type]
