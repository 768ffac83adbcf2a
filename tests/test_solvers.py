"""The closed form against systems that are assembled and solved another way, by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_form_helpers import constrained, penalised
from closed_form_helpers import problem as sized
from edits_helpers import gaussian, metric, moment_of
from torch import Tensor

from guardedit.edits import spectrum
from guardedit.edits.solvers import solve, solve_batch
from guardedit.edits.updates import Dense, LowRank
from guardedit.errors import SolveError

D_IN, D_OUT = 12, 5


def problem(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (d_in, batch), residuals (d_out, batch) and C."""
    return sized(batch, D_IN, D_OUT, seed)


def cost(update: Tensor, c: Tensor) -> float:
    """tr(ΔW C ΔWᵀ): how much ordinary text moves."""
    return float(torch.trace(update @ c @ update.T))


@pytest.mark.parametrize("batch", [1, 2, 5, D_IN])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_update_is_the_solution_of_the_constrained_least_squares(batch: int, seed: int) -> None:
    keys, residuals, c = problem(batch, seed)
    found, expected = solve(keys, residuals, moment_of(c)).dense(), constrained(keys, residuals, c)
    # Both solve systems of condition number up to some 1e5 in float64.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    assert float((found @ keys - residuals).norm() / residuals.norm()) < 1e-8


@pytest.mark.parametrize("seed", range(5))
def test_no_other_update_that_meets_the_constraint_moves_text_less(seed: int) -> None:
    keys, residuals, c = problem(3)
    best = solve(keys, residuals, moment_of(c)).dense()
    free = torch.eye(D_IN, dtype=torch.float64) - keys @ torch.linalg.pinv(keys)
    other = best + 0.1 * gaussian(D_OUT, D_IN, seed=seed + 100) @ free
    torch.testing.assert_close(other @ keys, residuals, rtol=1e-8, atol=1e-8)
    assert cost(other, c) > cost(best, c) * (1 + 1e-9)


@pytest.mark.parametrize("batch", [1, 4, D_IN, D_IN + 1, 5 * D_IN])
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_with_a_ridge_it_is_the_penalised_least_squares(ridge: float, batch: int) -> None:
    """argmin ‖ΔW K − R‖² + λ tr(ΔW C ΔWᵀ): one layer of MEMIT, also with more keys than dimensions."""
    keys, residuals, c = problem(batch)
    found = solve(keys, residuals, moment_of(c), ridge).dense().numpy()
    np.testing.assert_allclose(found, penalised(keys, residuals, c, ridge), rtol=1e-7, atol=1e-8)


def test_a_vanishing_ridge_tends_to_the_constraint_and_a_huge_one_leaves_the_weight_alone() -> None:
    keys, residuals, c = problem(4)
    ridges = (1e6, 1e3, 1.0, 1e-3, 1e-6, 1e-9)
    updates = [solve(keys, residuals, moment_of(c), ridge).dense() for ridge in ridges]
    misses = [float((update @ keys - residuals).norm() / residuals.norm()) for update in updates]
    assert misses == sorted(misses, reverse=True) and misses[-1] < 1e-8
    assert float(updates[0].norm() / updates[-1].norm()) < 1e-3
    exact = solve(keys, residuals, moment_of(c)).dense()
    # The ridge that is left, 1e-9, relative to eigenvalues of the Gram matrix of 1 and more.
    torch.testing.assert_close(updates[-1], exact, rtol=1e-7, atol=1e-8)


def test_one_key_moves_every_key_by_its_share_p_of_the_residual() -> None:
    """ΔW x = p(x)·r with p(x) = kᵀC⁻¹x / kᵀC⁻¹k, so p(k) = 1, and a key that is C⁻¹-orthogonal stays where it is."""
    keys, residuals, c = problem(1)
    update, key, residual = solve(keys, residuals, moment_of(c)), keys[:, 0], residuals[:, 0]
    towards = torch.as_tensor(np.linalg.inv(c.numpy())) @ key
    others = gaussian(20, D_IN, seed=9)
    share = others @ towards / (key @ towards)
    torch.testing.assert_close(update.move(others), share[:, None] * residual, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(update.move(key), residual, rtol=1e-10, atol=1e-12)
    orthogonal = others - (others @ towards / (towards @ towards))[:, None] * towards
    assert float(update.move(orthogonal).abs().max()) < 1e-10 < float(update.move(others).abs().max())


def test_the_unit_of_the_second_moment_does_not_matter() -> None:
    keys, residuals, c = problem(3)
    first, second = (solve(keys, residuals, moment_of(scale * c)).dense() for scale in (1.0, 1e4))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


def test_the_update_has_the_rank_of_the_batch_in_float64_whatever_the_keys_come_in() -> None:
    keys, residuals, c = problem(3)
    update = solve(keys.float(), residuals.float(), moment_of(c))
    assert update.left.dtype == update.right.dtype == torch.float64
    assert update.rank == 3 == int(torch.linalg.matrix_rank(update.dense()))
    assert update.shape == (D_OUT, D_IN)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6])
def test_keys_that_differ_by_rounding_only_are_refused_and_a_ridge_lets_them_pass(noise: float) -> None:
    """Two batches of one forward pass give keys that differ in the last bits of float32."""
    keys, residuals, c = problem(3)
    keys[:, 2] = keys[:, 0] * (1 + noise * gaussian(D_IN, seed=3))
    with pytest.raises(SolveError, match="3 keys span only 2 directions"):
        solve(keys, residuals, moment_of(c))
    eased = solve(keys, residuals, moment_of(c), ridge=0.1).dense()
    middle = (residuals[:, 0] + residuals[:, 2]) / 2
    assert float((eased @ keys[:, 0] - middle).norm()) < float(middle.norm())


def test_more_keys_than_dimensions_are_refused() -> None:
    with pytest.raises(SolveError, match=f"{D_IN + 1} keys span only {D_IN}"):
        solve(*problem(D_IN + 1)[:2], moment_of(metric(D_IN)))


def test_keys_of_very_different_length_are_not_thereby_dependent() -> None:
    keys, residuals, c = problem(3)
    keys = keys * torch.tensor([1e-4, 1.0, 1e4], dtype=torch.float64)
    found = solve(keys, residuals, moment_of(c))
    # Rounding of a sum in which terms of 1e8 cancel.
    torch.testing.assert_close(found.dense() @ keys, residuals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_no_weight_is_refused(ridge: float) -> None:
    with pytest.raises(SolveError, match="ridge"):
        solve(*problem(2)[:2], moment_of(metric(D_IN)), ridge)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["key", "residual"])
def test_what_is_not_finite_is_refused(which: str, bad: float) -> None:
    keys, residuals, c = problem(2)
    (keys if which == "key" else residuals)[1, 1] = bad
    with pytest.raises(SolveError, match="not finite"):
        solve(keys, residuals, moment_of(c))


def test_a_key_of_zero_is_refused() -> None:
    keys, residuals, c = problem(2)
    with pytest.raises(SolveError, match="key is zero"):
        solve(keys * torch.tensor([1.0, 0.0]), residuals, moment_of(c))


def test_a_singular_second_moment_is_refused() -> None:
    keys, residuals, c = problem(1)
    with pytest.raises(SolveError, match="not positive definite"):
        solve(keys, residuals, moment_of(torch.zeros_like(c)))


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_the_order_of_the_requests_does_not_matter(ridge: float) -> None:
    keys, residuals, c = problem(4)
    order = torch.tensor([2, 0, 3, 1])
    first = solve(keys, residuals, moment_of(c), ridge).dense()
    second = solve(keys[:, order], residuals[:, order], moment_of(c), ridge).dense()
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch, kind", [(3, LowRank), (4, Dense), (9, Dense)])
def test_factors_are_kept_as_long_as_they_are_smaller_than_the_matrix(batch: int, kind: type) -> None:
    """3·(12 + 5) numbers against 12·5; either way it is the same update."""
    keys, residuals, c = problem(batch)
    update = solve(keys, residuals, moment_of(c))
    assert isinstance(update, kind)
    np.testing.assert_allclose(update.dense().numpy(), constrained(keys, residuals, c), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 2.0])
@pytest.mark.parametrize("exact", [0, 1024])
def test_rank_and_condition_are_those_of_the_keys_in_the_metric(
    exact: int, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decomposed or by Lanczos: the same figures up to the tolerance, and the same bits twice."""
    monkeypatch.setattr(spectrum, "EXACT", exact)
    keys, residuals, c = problem(6)
    gram = keys.numpy().T @ np.linalg.solve(c.numpy(), keys.numpy()) + ridge * np.eye(6)
    scale = np.sqrt(np.diag(gram))
    expected = np.linalg.cond(gram / scale / scale[:, None])
    first, second = (solve_batch(keys, residuals, moment_of(c), ridge) for _ in range(2))
    assert first.condition == second.condition == pytest.approx(expected, rel=1e-2)
    assert first.rank == (None if ridge and not exact else 6)


@pytest.mark.parametrize("exact", [0, 1024])
def test_dependent_keys_are_counted_before_the_ridge_and_refused_without(
    exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "EXACT", exact)
    keys, residuals, c = problem(5)
    keys[:, 4] = keys[:, 0] - 2 * keys[:, 1]
    with pytest.raises(SolveError, match=r"5 keys span only (4|fewer) directions.* an editor with a ridge"):
        solve(keys, residuals, moment_of(c))
    assert solve_batch(keys, residuals, moment_of(c), 0.5).rank == (4 if exact else None)
