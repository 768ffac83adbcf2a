"""What the monitor cannot measure is said and never passes; what does not fit is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from drift_helpers import FAR, LAYER, PROMPTS, REQUEST, make_delta, make_probes, make_sae, make_saes
from edits_helpers import everything
from monitor_helpers import Sides, measured, record_base, sides, value

from guardedit.drift.measure import base_side, measure_drift
from guardedit.drift.null import BankEntry, NullBank
from guardedit.drift.probes import build_probes
from guardedit.drift.sides import monitored_hooks
from guardedit.edits.deltas import written
from guardedit.errors import BadRequestError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.records import ProbePrompts, digest_of

__all__ = ["sides"]


def test_a_staged_unembedding_needs_to_be_announced(tiny: ModelHandle) -> None:
    delta = everything(tiny, 0.01)
    sides = record_base(tiny, 0)
    with (
        written(tiny, delta),
        pytest.raises(StatisticsMismatchError, match="record the reference side again"),
    ):
        measured(tiny, sides, None)


def test_an_edit_of_everything_is_refused_from_a_later_layer_on(tiny: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="layer=0"):
        measured(tiny, record_base(tiny, LAYER), everything(tiny))


def test_numbers_that_are_not_finite_are_missing_scores_never_small_ones(
    tiny_llama: ModelHandle, sides: Sides
) -> None:
    name = tiny_llama.rewrite_parameter(LAYER)
    image = torch.full_like(tiny_llama.model.get_parameter(name), math.nan)
    report = measure_drift(tiny_llama, sides[1], sides[0], make_saes(), change={name: image})
    for missing in ("far_kl", "near_kl", "far_lost_top1", "near_lost_top1", "subject_lost_top1", "distractor_lost_top1",
                    "perplexity_ratio", "target_success", "target_p_new", "drifted_latents_far", "drifted_latents_near",
                    "omnibus_far", "sae_validity", "raw_shift", "spill_mass"):  # fmt: skip
        score = report.score(missing)
        assert score is not None
        assert score.value is None, missing
        assert score.reason, missing


def test_without_saes_behaviour_and_raw_activations_are_still_measured(tiny_llama: ModelHandle) -> None:
    probes = make_probes(tiny_llama)
    base = base_side(tiny_llama, probes, LAYER)
    assert base.hook_names == monitored_hooks(tiny_llama.n_layers, LAYER)
    report = measure_drift(tiny_llama, base, probes, {}, change=make_delta(tiny_llama, 0.5))
    assert value(report, "far_kl") > 0
    assert value(report, "raw_shift") > 0
    missing = report.score("drifted_latents_far")
    assert missing is not None
    assert missing.value is None
    assert any("No SAE" in sentence for sentence in report.not_measured)


def test_the_key_space_and_layers_below_are_not_watched(tiny_llama: ModelHandle) -> None:
    probes = make_probes(tiny_llama)
    asked = (
        "blocks.0.hook_resid_post",
        "blocks.1.mlp.hook_post",
        "blocks.2.hook_resid_post",
        "blocks.1.hook_mlp_out",
    )
    assert base_side(tiny_llama, probes, 1, asked).hook_names == (
        "blocks.1.hook_mlp_out",
        "blocks.2.hook_resid_post",
    )


def test_too_few_prompts_are_said_not_passed(tiny_llama: ModelHandle) -> None:
    few = ProbePrompts(near=PROMPTS.near[:3])
    probes = build_probes(tiny_llama, [REQUEST], [few], far_tokens=3000, far_texts=FAR)
    base = base_side(tiny_llama, probes, LAYER, tuple(make_saes()))
    report = measure_drift(tiny_llama, base, probes, make_saes(), change=make_delta(tiny_llama, 0.5))
    for name in ("drifted_latents_near", "subject_kl", "entailed_lost_top1"):
        score = report.score(name)
        assert score is not None
        assert score.value is None, name
        assert score.reason, name
    assert value(report, "near_kl") > 0
    assert any("No subject prompts" in sentence for sentence in report.not_measured)


def test_an_edit_below_the_recorded_layer_is_refused(tiny_llama: ModelHandle, sides: Sides) -> None:
    with pytest.raises(BadRequestError, match="layer=0"):
        measured(tiny_llama, sides, make_delta(tiny_llama, 0.5, layer=0))


def test_an_sae_of_another_width_or_hook_is_refused(tiny_llama: ModelHandle, sides: Sides) -> None:
    name = "blocks.1.hook_mlp_out"
    for wrong in (make_sae(name, d_in=16), make_sae("blocks.2.hook_mlp_out")):
        with pytest.raises(StatisticsMismatchError, match="was trained at"):
            measure_drift(tiny_llama, sides[1], sides[0], {name: wrong})


def test_a_reference_side_of_other_probes_is_refused(tiny_llama: ModelHandle, sides: Sides) -> None:
    with pytest.raises(StatisticsMismatchError, match="other probes"):
        measured(tiny_llama, (make_probes(tiny_llama, far_tokens=2000), sides[1]), None)


def test_a_percentile_needs_a_bank_of_this_model_and_layer(tiny_llama: ModelHandle, sides: Sides) -> None:
    delta = make_delta(tiny_llama, 0.5)
    report = measured(tiny_llama, sides, delta)
    statistics = {score.name: score.value for score in report.scores if score.value is not None}
    entries = tuple(
        BankEntry(
            name=f"{i}",
            kind="real",
            accepted=True,
            statistics={k: v * (i / 20) for k, v in statistics.items()},
        )
        for i in range(40)
    )
    bank = NullBank(
        model_digest=tiny_llama.digest(),
        layer=LAYER,
        hook_names=sides[1].hook_names,
        far_tokens=3000,
        entries=entries,
    )
    placed = measured(tiny_llama, sides, delta, bank=bank)
    assert value(placed, "drift_percentile") == pytest.approx(51.25)
    assert next(s for s in placed.scores if s.name == "far_kl").percentile == pytest.approx(51.25)
    others = (
        bank.model_copy(update={"layer": 2}),
        bank.model_copy(update={"model_digest": digest_of([])}),
        None,
    )
    for other in others:
        missing = measured(tiny_llama, sides, delta, bank=other).score("drift_percentile")
        assert missing is not None
        assert missing.value is None
        assert missing.reason


def test_a_reference_side_whose_unembedding_changed_since_is_refused(
    tiny_llama: ModelHandle, sides: Sides
) -> None:
    stale = replace(sides[1], head_digest=digest_of([]))
    with pytest.raises(StatisticsMismatchError, match="unembedding has changed"):
        measured(tiny_llama, (sides[0], stale), None)
