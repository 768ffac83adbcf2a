"""Thresholds and grades of autoencoders on data with a known answer."""

from __future__ import annotations

import pytest
import torch

from guardedit.saes import quality
from guardedit.saes.calibrate import Thresholded, pre_activations, thresholds
from guardedit.saes.train import Weights


def planted() -> tuple[Weights, torch.Tensor]:
    """Orthogonal directions and data made of exactly two of them a token: a perfect autoencoder exists."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    chosen = torch.rand(4000, 16, generator=generator).topk(2, dim=-1).indices
    acts = torch.zeros(4000, 16).scatter_(-1, chosen, 1.0 + torch.rand(4000, 2, generator=generator))
    return Weights(directions.T.contiguous(), torch.zeros(16), directions, torch.zeros(16)), acts @ directions


def test_thresholds_reach_the_target_l0_and_recover_a_planted_code() -> None:
    weights, x = planted()
    threshold, _ = thresholds(weights, [x], k=2)
    coder = Thresholded(weights, threshold)
    assert quality.mean_l0(coder, x) == pytest.approx(2.0, abs=0.01)
    assert quality.explained_variance(coder.reconstruct, x) > 0.999


def test_a_fixed_threshold_makes_latents_independent_where_top_k_does_not() -> None:
    weights, x = planted()
    threshold, _ = thresholds(weights, [x], k=2)
    coder = Thresholded(weights, threshold)
    pushed = x[:1] + 3 * weights.W_dec[5]
    others = torch.arange(16) != 5
    torch.testing.assert_close(
        coder.encode(pushed)[:, others], coder.encode(x[:1])[:, others], atol=1e-5, rtol=0
    )
    top = pre_activations(weights, pushed).topk(2).indices
    before = pre_activations(weights, x[:1]).topk(2).indices
    assert len(set(top[0].tolist()) & set(before[0].tolist())) < 2


def test_explained_variance_is_one_for_the_identity_and_zero_for_the_mean() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert quality.explained_variance(lambda part: part, x) == 1.0
    assert quality.explained_variance(lambda part: x.mean(0).expand_as(part), x) == pytest.approx(
        0.0, abs=1e-6
    )


def test_leakage_is_wholly_explained_by_a_perfect_autoencoder_and_not_at_all_by_an_orthogonal_one() -> None:
    weights, x = planted()
    threshold, _ = thresholds(weights, [x], k=2)
    moment = (x.T @ x).double() / len(x)
    share, explained = quality.leakage_share(Thresholded(weights, threshold), moment, x[:5], x)
    assert share == pytest.approx(1.0, abs=1e-3)
    assert explained == pytest.approx(1.0, abs=1e-3)
    silent = Thresholded(weights, torch.full((16,), 1e6))
    assert quality.leakage_share(silent, moment, x[:5], x) == (0.0, 0.0)


def test_pca_with_all_components_reconstructs_and_with_fewer_loses() -> None:
    _, x = planted()
    moment, mean = (x.T @ x).double() / len(x), x.double().mean(0)
    assert quality.explained_variance(quality.pca_reconstruction(moment, mean, 16), x) == pytest.approx(
        1.0, abs=1e-5
    )
    assert 0 < quality.explained_variance(quality.pca_reconstruction(moment, mean, 4), x) < 0.6
