"""Scores of targets are the model's own log-probabilities; metrics and intervals are what their definitions say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluation_helpers import spoken

from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.metrics import CaseScores, PromptScore, case_metrics, failed_metrics, harmonic_mean
from guardedit.evaluation.scoring import TargetScore, lay_out, score, score_pairs
from guardedit.models.handle import ModelHandle

PROMPTS = ["The Eiffel Tower is located in the city of", "Marie Curie was born in", "The capital of Italy is"]
TARGETS = ["Paris", "a very long answer of several words", "Rome"]
PAIRS = [(prompt, target) for prompt in PROMPTS for target in TARGETS]


def test_scores_are_the_log_probabilities_of_each_row_run_alone(tiny: ModelHandle) -> None:
    batched = score_pairs(tiny, PAIRS, batch_size=4)
    for (prompt, target), found in zip(PAIRS, batched, strict=True):
        pair = tiny.encode_pairs([prompt], [target])
        with torch.no_grad():
            logprobs = tiny.model(pair["input_ids"]).logits[0].double().log_softmax(-1)
        where = pair["target_mask"][0].nonzero().flatten()
        ids = pair["input_ids"][0, where]
        alone = logprobs[where - 1].gather(-1, ids[:, None])
        # Other batch shapes sum in another order: float32 noise, nothing else.
        assert found.logprob == pytest.approx(float(alone.mean()), abs=2e-5)
        assert found.greedy == bool((logprobs[where - 1].argmax(-1) == ids).all())


def test_greedy_is_what_the_model_would_say_by_itself(tiny_llama: ModelHandle) -> None:
    prompt, said = spoken(tiny_llama)
    best, other = score_pairs(
        tiny_llama, [(prompt, said), (prompt, "Warsaw" if said != "Warsaw" else "Rome")]
    )
    assert best.greedy and not other.greedy


def test_a_row_that_begins_another_is_not_run_by_itself(tiny_llama: ModelHandle) -> None:
    layout = lay_out(tiny_llama, [(PROMPTS[0], target) for target in ("x", "xyzzy", "x y z")])
    assert len(layout.rows) < 3
    assert len(lay_out(tiny_llama, PAIRS * 3).rows) == len(lay_out(tiny_llama, PAIRS).rows)


def test_a_layout_gives_the_same_bits_each_time(tiny: ModelHandle) -> None:
    layout = lay_out(tiny, PAIRS, batch_size=3)
    assert score(tiny, layout) == score(tiny, layout)


def test_a_broken_model_is_no_success() -> None:
    broken, fine = TargetScore(logprob=None, greedy=False), TargetScore(logprob=-0.1, greedy=True)
    for prompt in (PromptScore(new=broken, true=fine), PromptScore(new=fine, true=broken)):
        found = case_metrics(CaseScores(rewrite=(prompt,), paraphrase=(prompt,), neighborhood=(prompt,)))
        assert found["efficacy"] == found["paraphrase"] == found["neighborhood"] == 0.0
        assert found["efficacy_magnitude"] == found["neighborhood_magnitude"] == -1.0


def prompt_score(new: float, true: float) -> PromptScore:
    return PromptScore(
        new=TargetScore(logprob=math.log(new), greedy=new > 0.5),
        true=TargetScore(logprob=math.log(true), greedy=true > 0.5),
    )


def test_metrics_are_their_definitions() -> None:
    scores = CaseScores(
        rewrite=(prompt_score(0.6, 0.1),),
        paraphrase=(prompt_score(0.3, 0.1), prompt_score(0.1, 0.3)),
        neighborhood=(
            prompt_score(0.1, 0.7),
            prompt_score(0.2, 0.2),
            prompt_score(0.1, 0.3),
            prompt_score(0.4, 0.3),
        ),
    )
    found = case_metrics(scores)
    assert found["efficacy"] == found["efficacy_argmax"] == 1.0
    assert found["efficacy_magnitude"] == pytest.approx(0.5)
    assert found["paraphrase"] == 0.5
    assert found["neighborhood"] == 0.5, "a tie is no success"
    assert found["neighborhood_argmax"] == 0.25
    assert found["neighborhood_magnitude"] == pytest.approx((0.6 + 0 + 0.2 - 0.1) / 4)
    assert found["distractor_neighborhood"] is None, "what the case does not have is not measured"


def test_an_edit_that_failed_counts_as_not_effective_and_harmless() -> None:
    lucky = CaseScores(rewrite=(prompt_score(0.6, 0.1),), neighborhood=(prompt_score(0.1, 0.7),))
    found = failed_metrics(lucky)
    assert found["efficacy"] == found["efficacy_argmax"] == 0.0
    assert found["efficacy_magnitude"] == -1.0
    assert found["paraphrase"] is None
    assert found["neighborhood"] == 1.0


def test_the_harmonic_mean_is_zero_if_one_part_is() -> None:
    assert harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1.0, 0.0, 1.0]) == 0.0


def test_the_interval_is_seeded_and_holds_the_mean() -> None:
    values = [float(value) for value in np.random.default_rng(0).random(40)]
    first = estimate(values, seed=1)
    assert first is not None
    assert first == estimate(values, seed=1)
    assert first != estimate(values, seed=2)
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(sum(values) / 40)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    found = estimate([float(value) for value in values], seed=0)
    assert found is not None
    # 1.96 standard errors on each side; the bootstrap's own noise is a few per cent.
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


@pytest.mark.parametrize("n", [1, 10, 100])
def test_no_exception_among_n_cases_is_not_certainty(n: int) -> None:
    ones, zeros = estimate([1.0] * n, seed=0), estimate([0.0] * n, seed=0)
    assert ones is not None and zeros is not None
    assert ones.value == ones.high == 1.0
    # A success rate of `low` would give n successes out of n with probability 2.5 %.
    assert ones.low**n == pytest.approx(0.025)
    assert (zeros.low, zeros.high) == (0.0, pytest.approx(1 - ones.low))
    both_ways = estimate([0.0] * n, seed=0, signed=True)
    assert both_ways is not None
    assert -both_ways.low == both_ways.high == zeros.high


def test_cases_without_a_value_are_not_counted() -> None:
    found = estimate([None, 1.0, 0.0, None], seed=0)
    assert found is not None
    assert (found.value, found.n) == (0.5, 2)
    assert estimate([None, None], seed=0) is None
    assert estimate([], seed=0) is None
