"""Risk of deltas of several layers: sums over the layers, and with one layer that layer's own score to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guardedit.edits.deltas import LowRank
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.records import Score
from guardedit.risk.context import RiskContext, entropy_count
from guardedit.risk.delta_stage import DELTA_SCORES, delta_risk
from guardedit.risk.delta_view import DeltaView
from guardedit.risk.key_stage import key_scores
from guardedit.risk.key_view import KeyView, views_of
from guardedit.risk.measure import measure
from tests.risk_helpers import TOWER, WIDTH, bank, some_keys
from tests.risk_layer_helpers import LAYERS, REQUESTS, at_layer, delta_at, text, updates


def view_of(handle: ModelHandle, contexts: list[RiskContext], *layers: int) -> DeltaView:
    return DeltaView(
        contexts[0], views_of(contexts[0], REQUESTS), delta_at(handle, *layers), tuple(contexts[1:])
    )


def scores_of(view: DeltaView) -> dict[str, Score]:
    return {score.name: score for score in delta_risk(view).scores}


def test_leakage_of_several_layers_is_the_mean_summed_move_over_text(tiny: ModelHandle) -> None:
    contexts = [at_layer(tiny, layer) for layer in LAYERS]
    found, made = scores_of(view_of(tiny, contexts, *LAYERS)), updates(tiny)
    moved = sum(float(made[layer].move(text(layer)).square().sum(1).mean()) for layer in LAYERS)
    said = sum(
        float((text(layer) @ tiny.weight(layer).detach().double().T).square().sum(1).mean())
        for layer in LAYERS
    )
    assert found["leakage"].value == pytest.approx(moved, rel=1e-9)
    assert found["leakage_share"].value == pytest.approx(moved / said, rel=1e-6)


def test_leakage_meets_a_monte_carlo_draw_of_gaussian_text(tiny_llama: ModelHandle) -> None:
    contexts = [at_layer(tiny_llama, layer) for layer in LAYERS]
    total = 0.0
    for layer, one in zip(LAYERS, contexts, strict=True):
        root = torch.linalg.cholesky(one.need_second_moment.matrix)
        drawn = some_keys(20_000, 60 + layer) @ root.T
        total += float(updates(tiny_llama)[layer].move(drawn).square().sum(1).mean())
    leaked = scores_of(view_of(tiny_llama, contexts, *LAYERS))["leakage"].value
    assert leaked == pytest.approx(total, rel=0.05)


def test_the_tail_is_that_of_the_root_of_the_summed_squares_of_each_token(tiny_llama: ModelHandle) -> None:
    contexts = [at_layer(tiny_llama, layer) for layer in LAYERS]
    view, made = view_of(tiny_llama, contexts, *LAYERS), updates(tiny_llama)
    squares = sum(made[one.layer].move(one.bank.keys.double()).square().sum(1) for one in contexts)
    assert isinstance(squares, Tensor)
    yardstick = math.sqrt(sum(one.output_energy for one in contexts))
    expected = float(squares.sqrt().quantile(0.99)) / yardstick
    assert scores_of(view)["leakage_tail"].value == pytest.approx(expected, rel=1e-5)


def test_near_and_protected_interference_sum_the_same_tokens_moves(tiny_llama: ModelHandle) -> None:
    contexts = [at_layer(tiny_llama, layer) for layer in LAYERS]
    view, made = view_of(tiny_llama, contexts, *LAYERS), updates(tiny_llama)
    near, facts = [], []
    for one in contexts:
        own = torch.cat([KeyView(one, request, 24).near_keys for request in REQUESTS])
        near.append(made[one.layer].move(own.double()).square().sum(1))
        facts.append(made[one.layer].move(one.protected.keys[1:2].double()).square().sum(1))
    yardstick = sum(one.output_energy for one in contexts)
    found = scores_of(view)
    assert found["near_interference"].value == pytest.approx(
        float((near[0] + near[1]).mean()) / yardstick, rel=1e-4
    )
    # The fact about the edited tower itself does not count.
    assert found["protected_interference_facts"].value == pytest.approx(
        float(sum(facts)) / yardstick, rel=1e-9
    )


def test_latents_of_all_layers_leak_and_a_layer_without_an_sae_is_named(tiny_llama: ModelHandle) -> None:
    both = [at_layer(tiny_llama, layer) for layer in LAYERS]
    each = [scores_of(view_of(tiny_llama, [one], one.layer))["latent_leak"].value or 0.0 for one in both]
    whole = delta_risk(view_of(tiny_llama, both, *LAYERS))
    leaked = {score.name: score for score in whole.scores}
    assert leaked["latent_leak"].value == pytest.approx(sum(each)) and leaked["latent_leak"].reason is None
    assert leaked["latent_leak"].n == 2 * WIDTH
    assert {leak.hook_name for leak in whole.latents} == {key_hook(layer) for layer in LAYERS}
    half = scores_of(view_of(tiny_llama, [both[0], at_layer(tiny_llama, 2, key_sae=None)], *LAYERS))
    assert half["latent_leak"].value == pytest.approx(each[0])
    for name in ("latent_leak", "latent_leak_count", "leakage_explained"):
        assert "no SAE on the key space of layer 2" in (half[name].reason or ""), name
    blind = [at_layer(tiny_llama, layer, key_sae=None) for layer in LAYERS]
    none = scores_of(view_of(tiny_llama, blind, *LAYERS))
    assert none["latent_leak"].value is None and "layer 1, 2" in (none["latent_leak"].reason or "")
    assert none["leakage"].value == leaked["leakage"].value


def test_what_an_sae_does_not_see_at_another_layer_is_not_explained(tiny_llama: ModelHandle) -> None:
    seeing = at_layer(tiny_llama, 1)
    keys, moved = [], []
    for one in (seeing, at_layer(tiny_llama, 2)):
        keys.append(one.sampled_keys.double())
        moved.append(updates(tiny_llama)[one.layer].move(keys[-1]))
    explained = float((updates(tiny_llama)[1].move(seeing.reconstructed.double()) * moved[0]).sum())
    expected = explained / sum(float(one.square().sum()) for one in moved)
    view = view_of(tiny_llama, [seeing, at_layer(tiny_llama, 2, key_sae=None)], *LAYERS)
    assert scores_of(view)["leakage_explained"].value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_scores_as_the_plain_formulas_to_the_last_bit(tiny: ModelHandle, layer: int) -> None:
    """The shipped reference bank was made with these formulas, so a change of the last bit would be a change."""
    one = at_layer(tiny, layer)
    view, update = view_of(tiny, [one], layer), updates(tiny)[layer]
    found = {name: score.value for name, score in scores_of(view).items()}
    c = one.need_second_moment.matrix
    if isinstance(update, LowRank):
        leak = float(((update.left.T @ update.left) * (update.right @ c @ update.right.T)).sum())
    else:
        leak = float(((update.matrix @ c) * update.matrix).sum())
    said = one.output_energy
    moves = torch.linalg.vector_norm(update.move(one.bank.keys), dim=1)
    near = torch.cat([a.near_keys.float() for a in view.views])
    shares = {
        domain: update.move(one.protected.of_domain(domain, ["Eiffel Tower"]).double()).square().sum(-1)
        / said
        for domain in ("facts", "python", "prose")
    }
    assert one.key_sae is not None
    leaks = one.key_sae.energy.double() * update.move(one.key_sae.W_dec.double()).square().sum(-1)
    keys, seen = update.move(one.sampled_keys.double()), update.move(one.reconstructed.double())
    assert found == {
        "leakage": leak,
        "leakage_share": leak / said,
        "leakage_tail": float(moves.double().quantile(0.99)) / said**0.5,
        "near_interference": float((update.move(near.double()).square().sum(-1) / said).mean()),
        **{f"protected_interference_{domain}": float(share.mean()) for domain, share in shares.items()},
        "latent_leak": float(leaks.sum()),
        "latent_leak_count": float(entropy_count(leaks)),
        "leakage_explained": min(1.0, max(-1.0, float((seen * keys).sum() / keys.square().sum()))),
        "delta_norm_ratio": float(update.dense().norm() / tiny.weight(layer).detach().double().norm()),
    }


def test_a_layer_without_a_second_moment_gives_no_score_and_says_so(tiny_llama: ModelHandle) -> None:
    contexts = [at_layer(tiny_llama, 1), at_layer(tiny_llama, 2, second_moment=None)]
    report = measure(contexts[0], REQUESTS, delta_at(tiny_llama, *LAYERS), contexts[1:])
    for name in set(DELTA_SCORES) - {
        "delta_norm_ratio",
        "latent_leak",
        "latent_leak_count",
        "leakage_explained",
    }:
        score = report.score(name)
        assert score is not None and score.value is None, name
        assert "no second moment of layer 2" in (score.reason or ""), name
    assert all(
        s.value is not None
        for s in report.scores
        if s.stage in ("key", "rehearsal") and s.scope != "entailed"
    )
    unseen = [score.name for score in key_scores(KeyView(contexts[1], TOWER, 4), ("key_leakage", "key_norm"))
              if score.value is None]  # fmt: skip
    assert unseen == ["key_leakage", "key_norm"]


def test_a_delta_of_more_than_the_contexts_know_has_no_scores(tiny_llama: ModelHandle) -> None:
    found = scores_of(view_of(tiny_llama, [at_layer(tiny_llama, 1)], *LAYERS))
    assert found.pop("delta_norm_ratio").value is not None
    assert {score.value for score in found.values()} == {None}
    assert all("statistics are those of [1]" in (score.reason or "") for score in found.values())


def test_banks_of_other_text_cannot_be_summed(tiny_llama: ModelHandle) -> None:
    contexts = [at_layer(tiny_llama, 1), at_layer(tiny_llama, 2, bank=bank(some_keys(80)))]
    found = scores_of(view_of(tiny_llama, contexts, *LAYERS))
    assert found["leakage_tail"].value is None and "not of the same text" in (
        found["leakage_tail"].reason or ""
    )


def test_the_report_names_the_statistics_of_every_layer(tiny_llama: ModelHandle) -> None:
    contexts = [at_layer(tiny_llama, 1), at_layer(tiny_llama, 2, key_sae=None, remarks=("old statistics",))]
    report = measure(contexts[0], REQUESTS, delta_at(tiny_llama, *LAYERS), contexts[1:])
    assert {"key_bank", "key_bank of layer 2", "key_sae", "second_moment_corpus of layer 2"} <= set(
        report.inputs
    )
    assert "key_sae of layer 2" not in report.inputs
    assert "old statistics" in report.notes
    assert any("layer 2" in note and "no SAE" in note for note in report.notes)
