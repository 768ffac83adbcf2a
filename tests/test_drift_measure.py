"""The monitor on tiny real models: what it must find, what must not move, and what it must refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drift_helpers import CITIES, FAR, LAYER, PROMPTS, REQUEST, make_delta, make_probes, make_sae, make_saes
from edits_helpers import everything

from guardedit.drift.cache import KEPT_FILES
from guardedit.drift.measure import SAME_NUMERICS, base_side, measure_drift
from guardedit.drift.null import BankEntry, NullBank
from guardedit.drift.probes import ProbeSet, build_probes
from guardedit.drift.sides import BaseSide, monitored_hooks
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange, post_images, written
from guardedit.edits.keys import keys_everywhere
from guardedit.errors import BadRequestError, StatisticsMismatchError
from guardedit.models import sources
from guardedit.models.handle import ModelHandle
from guardedit.records import DriftReport, ProbePrompts, digest_of

Sides = tuple[ProbeSet, BaseSide]


def record_base(handle: ModelHandle, layer: int = LAYER, cache: Path | None = None) -> Sides:
    probes = make_probes(handle)
    return probes, base_side(handle, probes, layer, tuple(make_saes()), cache=cache)


@pytest.fixture
def sides(tiny_llama: ModelHandle) -> Sides:
    return record_base(tiny_llama)


def measured(handle: ModelHandle, sides: Sides, change: EditDelta | None, **options: object) -> DriftReport:
    return measure_drift(handle, sides[1], sides[0], make_saes(), change=change, **options)  # type: ignore[arg-type]


def value(report: DriftReport, name: str) -> float:
    score = report.score(name)
    assert score is not None, name
    assert score.value is not None, (name, score.reason)
    return score.value


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


def test_the_far_side_is_computed_once_for_all_edits_of_a_layer(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    _, first = record_base(tiny_llama, cache=tmp_path)
    other = build_probes(
        tiny_llama, [REQUEST], [ProbePrompts(near=PROMPTS.near[:6])], far_tokens=3000, far_texts=FAR
    )
    second = base_side(tiny_llama, other, LAYER, tuple(make_saes()), cache=tmp_path)
    assert (first.far_from_cache, second.far_from_cache) == (False, True)
    assert len(list(tmp_path.iterdir())) == 1
    for a, b in zip(first.recorded["far"], second.recorded["far"], strict=True):
        assert torch.equal(a.resid, b.resid)
        assert torch.equal(a.final, b.final)
    assert value(measured(tiny_llama, (other, second), None), "far_kl") == 0.0


def test_a_changed_model_does_not_reuse_the_cached_side(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    record_base(tiny_llama, cache=tmp_path)
    with written(tiny_llama, make_delta(tiny_llama, 0.1)):
        assert not record_base(tiny_llama, cache=tmp_path)[1].far_from_cache


def test_a_flipped_byte_in_the_cache_is_noticed_and_computed_again(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    record_base(tiny_llama, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for place in (10, len(path.read_bytes()) // 2, len(path.read_bytes()) - 1):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(bytes(data))
        assert not record_base(tiny_llama, cache=tmp_path)[1].far_from_cache
        assert record_base(tiny_llama, cache=tmp_path)[1].far_from_cache


def test_a_cache_that_cannot_be_written_stops_nothing(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    sides = record_base(tiny_llama, cache=blocked / "drift")
    assert value(measured(tiny_llama, sides, None), "far_kl") == 0.0


def test_old_far_sides_make_room_for_new_ones(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    for size in range(KEPT_FILES + 2):
        probes = make_probes(tiny_llama, far_tokens=100 + 40 * size)
        base_side(tiny_llama, probes, LAYER, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == KEPT_FILES
    assert base_side(tiny_llama, probes, LAYER, cache=tmp_path).far_from_cache


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


def test_prompts_are_read_once_and_targets_are_no_bystanders(tiny_llama: ModelHandle) -> None:
    doubled = ProbePrompts(near=(REQUEST.filled, "The capital of France is", "The capital of France is"))
    probes = build_probes(tiny_llama, [REQUEST], [doubled], far_tokens=500, far_texts=FAR)
    assert probes.prompts["near"].texts == ("The capital of France is",)
    assert set(probes.prompts) == {"target", "near", "distractor"}
    (sentence,) = probes.prompts["distractor"].texts
    assert sentence == "The Eiffel Tower is located in the city of Rome. The capital of France is"
    assert probes.plain_near == ("The capital of France is",)


def test_the_models_own_answer_stands_in_for_a_missing_old_target(tiny_llama: ModelHandle) -> None:
    request = REQUEST.model_copy(update={"target_true": None})
    probes = build_probes(tiny_llama, [request], [ProbePrompts()], far_tokens=500, far_texts=FAR)
    assert probes.targets[0].old.strip()


def test_control_text_keeps_its_size_by_domain_and_says_what_is_short(tiny_llama: ModelHandle) -> None:
    probes = make_probes(tiny_llama, far_tokens=1000)
    tokens = dict.fromkeys(FAR, 0)
    row = 0
    for _, mask in probes.far.batches:
        for n in mask.sum(1).tolist():
            tokens[probes.far.domains[row]] += n
            row += 1
    assert all(450 <= n <= 500 for n in tokens.values())
    short = build_probes(tiny_llama, [REQUEST], [PROMPTS], far_tokens=10**6, far_texts=FAR)
    assert any("were asked for" in note for note in short.notes)
    assert make_probes(tiny_llama).digest == make_probes(tiny_llama).digest


def test_probe_changes_show_tokens_a_person_can_check(tiny_llama: ModelHandle, sides: Sides) -> None:
    report = measured(tiny_llama, sides, make_delta(tiny_llama, 2.0))
    shown = [change for change in report.probes if change.scope == "near"]
    assert {change.prompt for change in shown} == set(PROMPTS.near)
    assert any(change.before != change.after for change in shown)
    assert all(0 <= change.p_after <= 1 for change in shown)
    assert len(CITIES) * 2 == len(shown)


def test_a_reference_side_whose_unembedding_changed_since_is_refused(
    tiny_llama: ModelHandle, sides: Sides
) -> None:
    stale = replace(sides[1], head_digest=digest_of([]))
    with pytest.raises(StatisticsMismatchError, match="unembedding has changed"):
        measured(tiny_llama, (sides[0], stale), None)


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
