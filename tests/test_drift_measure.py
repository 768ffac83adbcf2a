"""The monitor on tiny real models: what it must find, and what must not move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drift_helpers import LAYER, PROMPTS, REQUEST, make_delta, make_probes, make_saes
from edits_helpers import everything
from monitor_helpers import Sides, measured, record_base, sides, value

from guardedit.drift.measure import SAME_NUMERICS, base_side, measure_drift
from guardedit.drift.probes import build_probes
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange, post_images, written
from guardedit.edits.keys import keys_everywhere
from guardedit.models import sources
from guardedit.models.handle import ModelHandle
from guardedit.records import ProbePrompts

__all__ = ["sides"]

ZERO = (
    "far_kl", "far_kl_prose", "near_kl", "subject_kl", "entailed_kl", "far_lost_top1", "near_lost_top1",
    "subject_lost_top1", "drifted_latents_near", "drifted_latents_far", "drifted_latents_subject", "spill_mass",
    "omnibus_near",    "omnibus_subject", "omnibus_far", "energy_near", "energy_far", "raw_shift",
)  # fmt: skip


def test_an_unchanged_model_has_exactly_no_drift(tiny: ModelHandle) -> None:
    report = measured(tiny, record_base(tiny), None)
    assert {name: value(report, name) for name in ZERO} == dict.fromkeys(ZERO, 0.0)
    assert value(report, "perplexity_ratio") == 1.0
    assert value(report, "sae_validity") == 1.0
    assert value(report, "target_p_new") == value(report, "target_p_new_before")
    assert not any(latent.significant for latent in report.latents)
    assert all(report.integrity.values())


def test_a_large_edit_is_seen_in_every_scope_and_by_every_instrument(tiny: ModelHandle) -> None:
    report = measured(tiny, record_base(tiny), make_delta(tiny, 2.0))
    for name in ("far_kl", "near_kl", "subject_kl", "entailed_kl", "far_lost_top1", "omnibus_far", "raw_shift",
                 "drifted_latents_far", "drifted_latents_near", "spill_mass", "energy_far"):  # fmt: skip
        assert value(report, name) > 0, name
    assert {latent.kind for latent in report.latents} == {"intended", "spill", "collateral"}
    assert all(latent.kind == "intended" for latent in report.latents if latent.scope == "target")
    assert not any(latent.kind == "intended" for latent in report.latents if latent.scope != "target")
    assert {domain.domain for domain in report.domains} >= {
        "prose",
        "python",
        "near",
        "subject",
        "target",
        "entailed",
    }
    assert report.latents[0].label.startswith("concept")


def test_a_planted_concept_is_named_as_the_targets_own_and_as_spill_elsewhere(
    tiny_llama: ModelHandle, sides: Sides
) -> None:
    """An update that writes one latent's direction wherever the MLP is active: that latent leads every list."""
    sae, planted = make_saes()["blocks.1.hook_mlp_out"], 7
    left = sae.W_dec[planted].double()[:, None]
    keys = torch.cat(keys_everywhere(tiny_llama, list(PROMPTS.near), LAYER)).double()
    right = torch.linalg.lstsq(keys, torch.full((len(keys), 1), 2.0, dtype=torch.float64)).solution.T
    change = WeightChange(tiny_llama.rewrite_parameter(LAYER), LAYER, LowRank(left, right))
    report = measured(tiny_llama, sides, EditDelta((change,), "test", {}, {}))
    for scope, kind in (("target", "intended"), ("near", "spill"), ("far", "spill")):
        leading = next(x for x in report.latents if x.scope == scope and x.hook_name == sae.hook_name)
        assert (leading.latent, leading.kind, leading.significant) == (planted, kind, True), scope
        assert leading.label == "concept 7"
        assert leading.rate_after > leading.rate_before


def test_drift_grows_with_the_edit(tiny_llama: ModelHandle, sides: Sides) -> None:
    reports = [measured(tiny_llama, sides, make_delta(tiny_llama, size)) for size in (0.01, 0.1, 1.0)]
    for name in ("far_kl", "near_kl", "omnibus_far", "raw_shift"):
        values = [value(report, name) for report in reports]
        assert values == sorted(values), name
        assert values[0] < values[2], name


def test_a_delta_and_a_second_handle_on_the_edited_weights_are_judged_alike(
    tiny_llama: ModelHandle, sides: Sides, tiny_folders: dict[str, Path]
) -> None:
    delta = make_delta(tiny_llama, 0.5)
    staged = sources.load(str(tiny_folders["llama"]))
    with written(staged, delta):
        apart = measured(staged, sides, None)
    images = measure_drift(tiny_llama, sides[1], sides[0], make_saes(), change=post_images(tiny_llama, delta))
    together = measured(tiny_llama, sides, delta)
    for report in (apart, images):
        assert report.model_copy(update={"seconds": together.seconds}) == together


def test_the_model_is_left_bit_for_bit_also_when_measuring_raises(
    tiny_llama: ModelHandle, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, state = tiny_llama.manifest(), torch.get_rng_state()

    def interrupted(what: str, share: float) -> None:
        if "near" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(tiny_llama, sides, make_delta(tiny_llama, 1.0), progress=interrupted)
    measured(tiny_llama, sides, make_delta(tiny_llama, 1.0))
    assert tiny_llama.manifest() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_measurement_twice_gives_the_same_report(tiny_llama: ModelHandle, sides: Sides) -> None:
    delta = make_delta(tiny_llama, 0.5)
    first, second = (measured(tiny_llama, sides, delta) for _ in range(2))
    assert first.model_copy(update={"seconds": 0.0}) == second.model_copy(update={"seconds": 0.0})


def test_starting_at_the_edited_layer_equals_running_the_whole_model(tiny: ModelHandle) -> None:
    """The same edit measured from layer 0 on, where nothing is skipped, gives the same behaviour."""
    delta = make_delta(tiny, 0.5)
    reports = [measured(tiny, record_base(tiny, layer), delta) for layer in (0, LAYER)]
    for name in ("far_kl", "near_kl", "subject_kl", "perplexity_ratio"):
        assert value(reports[0], name) == value(reports[1], name), name


def test_a_change_below_the_edit_is_an_integrity_finding(tiny_llama: ModelHandle, sides: Sides) -> None:
    lower = post_images(tiny_llama, make_delta(tiny_llama, 0.5, layer=LAYER - 1))
    report = measure_drift(tiny_llama, sides[1], sides[0], make_saes(), change=lower)
    assert list(report.integrity.values()).count(False) == 2


def test_an_edited_unembedding_is_compared_with_the_reference_unembedding(
    tiny_llama: ModelHandle, sides: Sides
) -> None:
    name = f"{tiny_llama.architecture.embedding}.weight"  # tied: it is the unembedding too
    image = tiny_llama.model.get_parameter(name).detach() * 1.5
    report = measure_drift(tiny_llama, sides[1], sides[0], make_saes(), change={name: image})
    assert value(report, "far_kl") > 1e-3
    assert value(report, "raw_shift") == 0


def test_an_edit_of_everything_is_measured_from_the_tokens_on(tiny: ModelHandle) -> None:
    """Written for the measurement, or staged in the same model beforehand, as the pipeline does: one result."""
    delta = everything(tiny, 0.01)
    probes = make_probes(tiny)
    side = base_side(tiny, probes, delta.lowest_layer, tuple(make_saes()), changed=delta.parameters)
    together = measured(tiny, (probes, side), delta)
    with written(tiny, delta):
        staged = measured(tiny, (probes, side), None)
    assert staged.model_copy(update={"seconds": 0.0}) == together.model_copy(update={"seconds": 0.0})
    assert value(together, "far_kl") > 0 and value(together, "raw_shift") > 0
    assert together.integrity == {SAME_NUMERICS: True}
    assert value(measured(tiny, (probes, side), None), "far_kl") == 0.0


def test_moved_embeddings_are_seen_at_every_hook(tiny: ModelHandle) -> None:
    """Taking over the reference's own input of layer 0 would hide them."""
    (change,) = [c for c in everything(tiny).changes if c.parameter.startswith(tiny.architecture.embedding)]
    delta = EditDelta((change,), "test", {}, {})
    probes, side = record_base(tiny, 0)
    report = measured(tiny, (probes, side), delta)
    assert all(value(report, f"raw_shift_{name.replace('.', '_')}") > 0.01 for name in side.hook_names)
    texts = probes.prompts["near"].texts
    before = [next_logprobs(tiny, text) for text in texts]
    with written(tiny, delta):
        after = [next_logprobs(tiny, text) for text in texts]
    kls = [float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True)]
    assert value(report, "near_kl") == pytest.approx(sum(kls) / len(kls), rel=1e-3)


@torch.no_grad()
def next_logprobs(handle: ModelHandle, text: str) -> torch.Tensor:
    return handle.model(input_ids=handle.encode([text])["input_ids"]).logits[0, -1].double().log_softmax(-1)


@pytest.mark.slow
def test_the_unchanged_default_model_has_exactly_no_drift(default_handle: ModelHandle) -> None:
    prompts = ProbePrompts(subject=PROMPTS.subject, near=PROMPTS.near)
    probes = build_probes(default_handle, [REQUEST], [prompts], far_tokens=1024)
    base = base_side(default_handle, probes, 5)
    report = measure_drift(default_handle, base, probes, {})
    for name in ("far_kl", "near_kl", "subject_kl", "far_lost_top1", "raw_shift"):
        assert value(report, name) == 0.0, name
    assert value(report, "perplexity_ratio") == 1.0
    assert all(report.integrity.values())
