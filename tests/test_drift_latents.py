"""The monitor's statistics on counts with a known answer: what was planted is found, and nothing else is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from guardedit.drift import latents
from guardedit.drift.latents import Counts


def counts_of(before: Tensor, after: Tensor) -> Counts:
    """Counts of activations (seq, token, latent) with every token taking part."""
    return latents.count(before, after, torch.ones(before.shape[:2], dtype=torch.bool))


def activations(
    n_sequences: int = 40, n_tokens: int = 30, n_latents: int = 50, rate: float = 0.3, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_sequences, n_tokens, n_latents)
    fires = torch.rand(shape, generator=generator) < rate
    return fires * (1 + torch.rand(shape, generator=generator))


def test_identical_activations_give_nothing_at_all() -> None:
    codes = activations()
    tests = latents.compare_latents(counts_of(codes, codes), seed=0)
    assert not tests.testable.any()
    assert (tests.p_value == 1).all()
    assert (tests.turnover == 0).all()
    assert np.nanmax(np.abs(tests.magnitude_ratio - 1)) == 0
    assert latents.omnibus([tests]) == 0
    assert not latents.significant([tests])[0].any()


def test_a_planted_rate_change_is_found_and_no_other_latent_is() -> None:
    before = activations()
    after = before.clone()
    after[:, ::2, 7] = 0
    tests = latents.compare_latents(counts_of(before, after), seed=0)
    assert np.flatnonzero(latents.significant([tests])[0]).tolist() == [7]
    assert tests.rate_after[7] < 0.7 * tests.rate_before[7]


def test_a_move_to_other_tokens_at_the_same_rate_is_seen_as_turnover() -> None:
    before = torch.zeros(40, 30, 10)
    before[:, :10, :] = 1.0
    after = before.clone()
    after[:, :, 3] = before[:, :, 3].roll(15, dims=1)
    counts = counts_of(before, after)
    tests = latents.compare_latents(counts, seed=0)
    assert tests.rate_before[3] == tests.rate_after[3]
    assert (latents.sign_flip_p(counts.after - counts.before, 0) == 1).all()  # the rate test alone is blind
    assert tests.turnover[3] == 1.0
    assert np.flatnonzero(latents.significant([tests])[0]).tolist() == [3]


def test_a_weaker_activation_at_the_same_tokens_is_found_by_magnitude() -> None:
    before = activations()
    after = before.clone()
    after[..., 5] *= 0.5
    tests = latents.compare_latents(counts_of(before, after), seed=0)
    assert tests.turnover[5] == 0
    assert tests.magnitude_ratio[5] == pytest.approx(0.5)
    assert np.flatnonzero(latents.significant([tests])[0]).tolist() == [5]


def test_a_significant_but_tiny_change_stays_under_the_effect_floor() -> None:
    before = activations()
    after = before.clone()
    after[..., 5] *= 1.01
    tests = latents.compare_latents(counts_of(before, after), seed=0)
    assert latents.discovered([tests])[0][5]
    assert not latents.significant([tests])[0].any()


def test_under_exchangeable_sides_the_false_discovery_share_holds_over_200_seeds() -> None:
    """Every discovery is false here, so the share of runs with any is the false discovery rate: 0.05 at most."""
    n_sequences, n_latents, runs = 24, 40, 200
    with_discovery = 0
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        on = torch.full((n_sequences, n_latents), 30.0)
        gained, lost = (torch.poisson(torch.ones_like(on), generator=generator) for _ in range(2))
        jitter = torch.randn(on.shape, generator=generator)
        counts = Counts(
            before=on + lost, after=on + gained, both=on, mass_before=on, mass_after=on + jitter, shift=jitter,
            tokens=torch.full((n_sequences,), 60.0),
        )  # fmt: skip
        with_discovery += bool(latents.discovered([latents.compare_latents(counts, seed)])[0].any())
    # 0.05 plus three standard errors of a share over 200 runs
    assert with_discovery / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_the_test_has_power_where_the_null_is_false() -> None:
    """The companion of the test above: the same noise with a shift of a tenth of the firings is found."""
    generator = torch.Generator().manual_seed(0)
    on = torch.full((40, 20), 30.0)
    lost = torch.poisson(torch.ones_like(on), generator=generator)
    gained = torch.poisson(torch.ones_like(on), generator=generator)
    gained[:, 4] += 3
    counts = Counts(
        before=on + lost, after=on + gained, both=on, mass_before=on, mass_after=on, shift=torch.zeros_like(on),
        tokens=torch.full((40,), 60.0),
    )  # fmt: skip
    assert np.flatnonzero(latents.discovered([latents.compare_latents(counts, 0)])[0]).tolist() == [4]


def test_sign_flips_agree_with_all_sign_patterns() -> None:
    differences = torch.tensor([3.0, 1.0, 2.0, -1.0, 2.0, 1.0, 1.0, 4.0])[:, None]
    patterns = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(patterns @ differences[:, 0].numpy()) >= abs(float(differences.sum()))).mean()
    # 2,000 flips: three standard errors of a share
    assert latents.sign_flip_p(differences, 0)[0] == pytest.approx(exact, abs=3 * math.sqrt(exact / 2000))


def test_hoeffdings_bound_stands_in_where_flips_cannot_reach() -> None:
    p = latents.sign_flip_p(torch.ones(40, 1), 0)[0]
    assert 2 * 2.0**-40 <= p < 1e-8


def test_fewer_than_six_sequences_are_never_significant() -> None:
    differences = torch.zeros(40, 1)
    differences[:5] = 100
    assert latents.sign_flip_p(differences, 0)[0] == 1


def test_tokens_that_are_not_counted_leave_no_trace() -> None:
    before, after = activations(seed=1), activations(seed=2)
    counted = torch.ones(before.shape[:2], dtype=torch.bool)
    counted[:, 10:] = False
    whole, part = latents.count(before, after, counted), counts_of(before[:, :10], after[:, :10])
    for name in Counts.__dataclass_fields__:
        assert torch.allclose(getattr(whole, name), getattr(part, name)), name


def test_energy_distance_is_zero_for_equal_sides_and_finds_a_common_shift() -> None:
    codes = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert latents.energy_distance(codes, codes, 0) == (0.0, 1.0)
    value, p = latents.energy_distance(codes, codes + 1.0, 0)
    assert value > 0
    assert p == 1 / 1000


def test_resolution_is_the_smallest_change_that_passes_the_first_place_of_the_correction() -> None:
    found = latents.resolution(n_sequences=64, n_tokens=8192, n_tested=1000)
    needed = found["sequences_needed"]
    assert 3 * 2.0 ** (1 - needed) <= 0.05 / 1000 < 3 * 2.0 ** (2 - needed)
    assert found["smallest_rate_change"] == needed / 8192
    assert "smallest_rate_change" not in latents.resolution(n_sequences=10, n_tokens=1280, n_tested=1000)


def test_spill_counts_only_the_latents_it_is_asked_about() -> None:
    before = torch.ones(10, 10, 3)
    after = before.clone()
    after[..., 0] = 0
    after[:, :5, 1] = 0
    counts = counts_of(before, after)
    assert latents.switched([counts], [np.array([True, False, True])]) == 1.0
    assert latents.switched([counts], [np.array([False, True, False])]) == 0.5
