"""Behaviour: KL, perplexity, lost answers and their intervals, against float64 and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guardedit.drift import behaviour
from guardedit.drift.behaviour import Positions


class Identity(nn.Module):
    """A head whose logits are the states themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def positions(before: Tensor, after: Tensor, following: Tensor | None = None) -> Positions:
    head = Identity()
    n = len(before)
    follows = following if following is not None else torch.full((n,), -1)
    return behaviour.compare(before, after, (head, head), follows, torch.arange(n) // 4, torch.clone)


def logits(n: int, vocab: int, seed: int) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_kl_agrees_with_float64_from_tiny_to_large_changes() -> None:
    before = logits(40, 500, 0)
    for size in (1e-3, 1e-1, 10.0):
        after = before + size * logits(40, 500, 1)
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        exact = (p.exp() * (p - q)).sum(-1)
        assert torch.allclose(positions(before, after).kl_nats, exact, rtol=1e-3, atol=1e-9)


def test_kl_of_equal_logits_is_exactly_zero_and_never_negative() -> None:
    before = logits(300, 100, 0)
    assert bool((positions(before, before).kl_nats == 0).all())
    assert bool((positions(before, before + 1e-6 * logits(300, 100, 1)).kl_nats >= 0).all())


def test_kl_survives_a_token_whose_probability_underflows_before() -> None:
    before = torch.zeros(1, 4)
    before[0, 0] = 300.0
    after = torch.zeros(1, 4)
    after[0, 1] = 300.0
    assert float(positions(before, after).kl_nats) == pytest.approx(300.0)


def test_perplexity_ratio_is_exactly_one_for_equal_models_and_e_for_one_nat() -> None:
    before = logits(16, 50, 0)
    following = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(1))
    everything = torch.ones(16, dtype=torch.bool)
    same = behaviour.summarise(positions(before, before, following), everything, "prose", "far", 0)
    assert same.perplexity == (1.0, 1.0, 1.0)
    assert same.kl == (0.0, 0.0, 0.0)
    assert same.lost == (0.0, 0.0, 0.0)
    gained = positions(before, before, following)
    worse = Positions(**{**vars(gained), "nll_after": gained.nll_before + 1})
    ratio = behaviour.summarise(worse, everything, "prose", "far", 0).perplexity
    assert ratio is not None
    assert ratio[0] == pytest.approx(math.e, rel=1e-6)


def test_lost_top_answers_are_counted_where_the_most_likely_token_changed() -> None:
    before = torch.eye(8) * 9
    after = before.clone()
    after[:3] = after[:3].roll(1, dims=1)
    seen = positions(before, after)
    assert seen.lost.tolist() == [True] * 3 + [False] * 5
    assert float(seen.p_after[0]) < float(seen.p_before[0])


def test_a_nan_anywhere_makes_the_summary_unusable_instead_of_small() -> None:
    before = logits(16, 50, 0)
    after = before.clone()
    after[5, 7] = math.nan
    summary = behaviour.summarise(
        positions(before, after), torch.ones(16, dtype=torch.bool), "prose", "far", 0
    )
    assert not summary.finite


def test_the_bootstrap_over_sequences_is_wider_than_over_tokens_when_tokens_depend() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(size=20)
    by_sequence = behaviour.interval(level * 50, np.full(20, 50.0), 0)
    by_token = behaviour.interval(np.repeat(level, 50), np.ones(1000), 0)
    assert by_sequence[1] - by_sequence[0] > 3 * (by_token[1] - by_token[0])
    assert by_sequence[0] < level.mean() < by_sequence[1]


def test_wilsons_interval_does_not_claim_certainty_from_all_or_none() -> None:
    assert behaviour.wilson(0.0, 20)[1] == pytest.approx(0.161, abs=1e-3)
    assert behaviour.wilson(1.0, 20)[0] == pytest.approx(0.839, abs=1e-3)


def test_the_distractor_counts_only_answers_that_survived_it_in_the_reference() -> None:
    before, after = torch.eye(4) * 9, torch.eye(4) * 9
    after[0] = after[0].roll(1)
    after[3] = after[3].roll(1)
    plain = torch.tensor(
        [0, 1, 2, 0]
    )  # the last prompt lost its answer to the sentence already before the edit
    found = behaviour.distractor(plain, positions(before, after))
    assert (found.n_kept_before, found.kept_before, found.kept_after) == (3, 0.75, 0.75)
    assert found.lost == pytest.approx(1 / 3)
