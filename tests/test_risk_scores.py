"""Each pre-op score on a construction whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from guardedit.errors import MissingStatisticsError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.risk import delta_stage, key_stage
from guardedit.risk.context import entropy_count, participation
from guardedit.risk.key_stage import key_risk
from guardedit.risk.measure import SCORES
from guardedit.risk.scores import Measured, ScoreRule, measure_all, worst_of
from tests.risk_helpers import (
    TOWER,
    WIDTH,
    bank,
    close,
    context,
    delta_of,
    delta_view,
    dictionary,
    key_view,
    moment,
    rank_one,
    some_keys,
    unit,
)

RESIDUAL = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


# --- from the key alone ---


def test_orthogonal_neighbours_are_not_moved(tiny_llama: ModelHandle) -> None:
    view = key_view(context(tiny_llama), unit(0), torch.stack([unit(1), 3 * unit(2)]))
    assert key_stage.key_near_interference(view).value == close(0.0)


def test_a_neighbour_with_the_same_key_is_moved_like_the_subject(tiny_llama: ModelHandle) -> None:
    key = some_keys(1)[0]
    view = key_view(context(tiny_llama), key, torch.stack([key, key]))
    assert key_stage.key_near_interference(view).value == close(1.0)


def test_orthogonal_means_orthogonal_after_whitening(tiny_llama: ModelHandle) -> None:
    spread = some_keys(200)
    c = spread.T @ spread / 200
    key = some_keys(1, 3)[0]
    across = some_keys(1, 4)[0]
    whitened = torch.linalg.solve(c, key)
    across = across - whitened * (across @ whitened) / (whitened @ whitened)
    view = key_view(context(tiny_llama, second_moment=moment(c)), key, across[None])
    assert key_stage.key_near_interference(view).value == close(0.0)


def test_key_leakage_is_the_mean_square_of_p_over_the_text_of_c(tiny_llama: ModelHandle) -> None:
    text = some_keys(300) * torch.linspace(0.2, 3.0, WIDTH, dtype=torch.float64)
    view = key_view(context(tiny_llama, second_moment=moment(text.T @ text / 300)), some_keys(1, 5)[0])
    assert key_stage.key_leakage(view).value == close(float(view.p(text).square().mean()))


def test_a_key_along_a_common_direction_leaks_more(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, second_moment=moment(torch.diag(torch.linspace(10.0, 0.1, WIDTH))))
    common, rare = key_view(ctx, unit(0)), key_view(ctx, unit(WIDTH - 1))
    assert key_stage.key_leakage(common).value > 50 * key_stage.key_leakage(rare).value


def test_a_key_of_twice_the_mean_norm_has_norm_two(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, second_moment=moment(torch.eye(WIDTH), mean_norm=1.5))
    assert key_stage.key_norm(key_view(ctx, 3.0 * unit(4))).value == close(2.0)


def test_the_subject_position_is_its_last_token_in_the_bare_prompt(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, contexts=("", "Well. "))
    batch = tiny_llama.encode([TOWER.filled])
    position = int(key_stage.subject_position(key_stage.KeyView(ctx, TOWER, 4)).value)
    start, end = batch["offsets"][0, position].tolist()
    assert TOWER.filled[start:end].strip() and TOWER.filled[:end].endswith("Tower")


def test_a_subject_at_the_start_of_the_text_is_remarked(tiny_llama: ModelHandle) -> None:
    first = TOWER.model_copy(update={"prompt": "{} is in"})
    measured = key_stage.subject_position(key_stage.KeyView(context(tiny_llama), first, 4))
    assert measured.reason is not None and "start" in measured.reason


def test_a_perfect_dictionary_sees_all_of_the_key_and_a_blind_one_nothing(tiny_llama: ModelHandle) -> None:
    both_ways = dictionary(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
    blind = dictionary(torch.zeros(4, WIDTH))
    centred = bank(torch.cat([some_keys(30), -some_keys(30)]))
    for sae, share in ((both_ways, 0.0), (blind, 1.0)):
        view = key_view(context(tiny_llama, key_sae=sae, bank=centred), some_keys(1, 9)[0])
        assert key_stage.sae_view(view).value == close(share)


def test_participation_is_one_for_one_hot_and_n_for_equal_weights() -> None:
    one_hot = torch.tensor([0.0, 5.0, 0.0, 0.0])
    assert float(participation(one_hot)) == close(1.0)
    assert float(participation(torch.full((4,), 0.3))) == close(4.0)
    assert float(entropy_count(one_hot)) == close(1.0)
    assert float(entropy_count(torch.full((4,), 0.3))) == close(4.0)


def test_a_key_that_is_one_latent_has_participation_one(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, key_sae=dictionary(torch.eye(WIDTH)))
    assert key_stage.key_participation(key_view(ctx, 2.0 * unit(5))).value == close(1.0)
    assert key_stage.key_participation(key_view(ctx, unit(5) + unit(6))).value == close(2.0)


def test_neuron_polysemanticity_counts_the_latents_of_the_neurons_that_carry_the_key(
    tiny_llama: ModelHandle,
) -> None:
    decoder = torch.eye(WIDTH)
    decoder[7] = torch.eye(WIDTH)[8]  # latents 7 and 8 both write to neuron 8, none to neuron 7
    ctx = context(tiny_llama, key_sae=dictionary(decoder))
    assert key_stage.neuron_polysemanticity(key_view(ctx, unit(3))).value == close(1.0)
    assert key_stage.neuron_polysemanticity(key_view(ctx, unit(8))).value == close(2.0)
    assert key_stage.neuron_polysemanticity(key_view(ctx, unit(7))).value == close(1.0)


def test_the_entropy_twin_counts_the_domains_a_neuron_fires_in(tiny_llama: ModelHandle) -> None:
    keys = torch.stack([unit(0) + unit(1), unit(0) + unit(2), unit(0) + unit(3)])
    ctx = context(tiny_llama, bank=bank(keys, ("prose", "python", "chat")))
    assert key_stage.neuron_entropy_twin(key_view(ctx, unit(1))).value == close(1.0)
    assert key_stage.neuron_entropy_twin(key_view(ctx, unit(0))).value == close(3.0)


def test_conflict_is_the_surprise_at_the_target(tiny: ModelHandle) -> None:
    view = key_stage.KeyView(context(tiny), TOWER, 4)
    for score, target in ((key_stage.conflict_old_nats, "Paris"), (key_stage.conflict_new_nats, "Rome")):
        (logprobs,) = tiny.token_logprobs([TOWER.filled], [target])
        assert score(view).value == close(-float(logprobs.sum()), 1e-5)


def test_without_an_old_target_the_models_own_answer_is_taken(tiny_llama: ModelHandle) -> None:
    unnamed = TOWER.model_copy(update={"target_true": None})
    measured = key_stage.conflict_old_nats(key_stage.KeyView(context(tiny_llama), unnamed, 4))
    assert measured.reason is not None and "own answer" in measured.reason
    assert 0 < measured.value < math.log(len(tiny_llama.tokenizer))


def test_the_tokens_shown_are_those_with_the_largest_share_of_the_move(tiny_llama: ModelHandle) -> None:
    keys = torch.stack([0.1 * unit(0), unit(1), -0.9 * unit(0), 0.5 * unit(0)])
    facts = bank(torch.stack([unit(0), 0.7 * unit(0)]), ("facts", "facts"), ("Eiffel Tower", "Louvre"))
    view = key_view(context(tiny_llama, bank=bank(keys), protected=facts), unit(0), unit(1)[None])
    tokens = [(token.token, token.domain) for token in key_risk(view).tokens]
    # The fact about the edited subject itself (move 1.0) is not news.
    text = [("word2", "prose"), ("word3", "prose"), ("word0", "prose"), ("word1", "prose")]
    assert tokens == [text[0], ("word1", "facts"), *text[1:]]
    assert key_risk(view).tokens[0].move == close(0.9)


# --- what is missing is never a pass ---


def test_without_an_sae_only_its_scores_are_missing_and_say_why(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama)
    scores = (
        *measure_all(key_stage.KEY_SCORES, key_stage.KeyView(ctx, TOWER, 4), 0),
        *delta_stage.delta_risk(delta_view(ctx, rank_one(unit(0), RESIDUAL))).scores,
    )
    missing = {score.name for score in scores if score.value is None}
    assert missing == {
        "sae_view", "neuron_polysemanticity", "key_participation", "latent_leak", "latent_leak_count",
        "leakage_explained",
    }  # fmt: skip
    assert all("no SAE" in (score.reason or "") for score in scores if score.value is None)


def test_nan_in_a_delta_leaves_no_score_that_depends_on_it(tiny_llama: ModelHandle) -> None:
    update = rank_one(unit(0), RESIDUAL * math.nan)
    risk = delta_stage.delta_risk(
        delta_view(context(tiny_llama, key_sae=dictionary(torch.eye(WIDTH))), update)
    )
    assert [score.name for score in risk.scores if score.value is not None] == []
    assert all("nan" in (score.reason or "") for score in risk.scores)
    assert risk.latents == () and risk.tokens == ()


def test_a_delta_of_another_layer_has_no_scores_here(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama)
    view = delta_stage.DeltaView(
        ctx,
        (key_view(ctx, unit(0), unit(1)[None]),),
        delta_of(tiny_llama, rank_one(unit(0), RESIDUAL), layer=2),
    )
    found = {score.name: score.value for score in delta_stage.delta_risk(view).scores}
    assert found.pop("delta_norm_ratio") is not None
    assert set(found.values()) == {None}


def test_an_indefinite_second_moment_fails_its_scores_and_no_others(tiny_llama: ModelHandle) -> None:
    ctx = context(tiny_llama, second_moment=moment(-torch.eye(WIDTH)))
    scores = {score.name: score for score in key_risk(key_stage.KeyView(ctx, TOWER, 4)).scores}
    assert scores["key_leakage"].value is None and scores["key_near_interference"].value is None
    assert scores["key_norm"].value is not None and scores["conflict_new_nats"].value is not None


def test_a_failing_score_hides_no_other_but_a_bug_surfaces() -> None:
    def failing(_: object) -> Measured:
        raise MissingStatisticsError("not there")

    def buggy(_: object) -> Measured:
        raise TypeError("a bug")

    rules = {
        "broken": ScoreRule(failing, "key", "far", "ratio"),
        "infinite": ScoreRule(lambda _: Measured(math.inf), "key", "far", "ratio"),
        "sound": ScoreRule(lambda _: Measured(2.0), "key", "far", "ratio"),
    }
    broken, infinite, sound = measure_all(rules, object(), 0)
    assert (broken.value, infinite.value, sound.value) == (None, None, 2.0)
    assert "not there" in (broken.reason or "") and "inf" in (infinite.reason or "")
    with pytest.raises(TypeError):
        measure_all({"bug": ScoreRule(buggy, "key", "far", "ratio")}, object(), 0)


def test_of_several_requests_the_worst_counts_and_a_missing_one_is_missing_for_all() -> None:
    rules = {
        "up": ScoreRule(lambda view: Measured(view), "key", "far", "ratio"),
        "down": ScoreRule(lambda view: Measured(view), "key", "far", "ratio", worst="min"),
    }
    columns = list(zip(*(measure_all(rules, value, 0) for value in (1.0, 3.0, 2.0)), strict=True))
    names = ["one", "three", "two"]
    up, down = (
        worst_of(rule, list(column), names) for rule, column in zip(rules.values(), columns, strict=True)
    )
    assert (up.value, down.value) == (3.0, 1.0)
    assert "three" in (up.reason or "") and "one" in (down.reason or "")
    gap = measure_all(rules, math.nan, 0)[0]
    assert worst_of(rules["up"], [columns[0][0], gap], names[:2]).value is None


def test_statistics_of_another_width_or_layer_are_refused(tiny_llama: ModelHandle) -> None:
    for parts in (
        {"second_moment": moment(torch.eye(WIDTH + 1))},
        {"second_moment": moment(torch.eye(WIDTH), hook_name="blocks.2.mlp.hook_post")},
        {"bank": bank(torch.zeros(3, WIDTH - 1))},
        {"key_sae": dictionary(torch.eye(WIDTH + 2))},
    ):
        with pytest.raises(StatisticsMismatchError):
            context(tiny_llama, **parts)


def test_every_score_says_what_it_is_and_belongs_to_a_stage() -> None:
    assert sorted({rule.stage for rule in SCORES.values()}) == ["delta", "key", "rehearsal"]
    for name, rule in SCORES.items():
        assert "/" not in name and rule.unit and len(rule.formula) > 30, name
