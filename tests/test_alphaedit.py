"""AlphaEdit: nothing in the preserved directions, less at the keys of earlier edits, and the published equation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from closed_form_helpers import EARLIER, FACTS, stacked, wanted_of
from edits_helpers import CONTEXTS, LAYER, gaussian, metric, moment_of
from torch import Tensor

from guardedit.editors.alphaedit import (
    AlphaEditHparams,
    alphaedit,
    solve_alphaedit,
    solve_beside,
    still_meant,
)
from guardedit.edits.deltas import EditDelta, encode
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import keys_of
from guardedit.edits.preserving import free_space
from guardedit.edits.spreading import Problem
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.records import EditRequest

ENERGY = 0.9
MOMENT = moment_of(metric())


def inputs_of(earlier: tuple[EditRequest, ...] = ()) -> SolveInputs:
    return SolveInputs({key_hook(LAYER): MOMENT}, earlier=earlier)


def solved(handle: ModelHandle, earlier: tuple[EditRequest, ...] = (), l2: float = 0.1) -> EditDelta:
    hparams = AlphaEditHparams(layer=LAYER, preserved_energy=ENERGY, l2=l2)
    return alphaedit(handle, wanted_of(handle), hparams, inputs_of(earlier))


def split() -> tuple[np.ndarray, np.ndarray]:
    """Preserved and free eigenvectors of C, from numpy: the fewest large ones that hold the energy."""
    values, axes = np.linalg.eigh(metric().numpy())
    values, axes = values[::-1], axes[:, ::-1]
    held = int(np.searchsorted(np.cumsum(values) / values.sum(), ENERGY)) + 1
    return axes[:, :held], axes[:, held:]


def earlier_keys(handle: ModelHandle) -> Tensor:
    return torch.stack([key.k_star for key in keys_of(handle, EARLIER, LAYER, ("", "Berlin. "))], 1)


def published(keys: np.ndarray, residuals: np.ndarray, kept: np.ndarray, l2: float) -> np.ndarray:
    """(P(KKᵀ + M) + L2·I) Δᵀ = P K Rᵀ."""
    free = split()[1]
    p = free @ free.T
    system = p @ (keys @ keys.T + kept @ kept.T) + l2 * np.eye(len(p))
    return np.linalg.solve(system, p @ keys @ residuals.T).T


def test_the_preserved_directions_are_annihilated(tiny: ModelHandle) -> None:
    update = solved(tiny, EARLIER).update(LAYER).dense()
    preserved, free = (torch.as_tensor(axes.copy()) for axes in split())
    assert preserved.shape[1] > 0 and free.shape[1] > 0
    assert float((update @ preserved).norm()) < 1e-10 * float((update @ free).norm())


@pytest.mark.parametrize("earlier", [(), EARLIER])
@pytest.mark.parametrize("l2", [1e-3, 10.0])
def test_it_is_the_published_equation(tiny: ModelHandle, l2: float, earlier: tuple[EditRequest, ...]) -> None:
    wanted = wanted_of(tiny)
    kept = earlier_keys(tiny) if earlier else torch.zeros(64, 0, dtype=torch.float64)
    expected = published(stacked(wanted).numpy(), wanted.residuals.numpy(), kept.numpy(), l2)
    found = solved(tiny, earlier, l2).update(LAYER).dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("batch, kept", [(3, 70), (40, 40), (70, 0)])
def test_more_keys_than_free_directions_give_the_same_equation(batch: int, kept: int) -> None:
    keys, residuals, others = gaussian(64, batch), gaussian(32, batch, seed=1), gaussian(64, kept, seed=2)
    space = free_space(MOMENT, ENERGY)
    assert batch + kept > space.axes.shape[1]
    found = solve_beside(Problem(LAYER, keys, residuals), others, space, 0.1).update.dense().numpy()
    expected = published(keys.numpy(), residuals.numpy(), others.numpy(), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


def test_keys_of_earlier_edits_move_less_when_they_are_remembered(tiny: ModelHandle) -> None:
    keys = earlier_keys(tiny)
    forgetful, mindful = (solved(tiny, earlier) for earlier in ((), EARLIER))
    before, after = (float((delta.update(LAYER).dense() @ keys).norm()) for delta in (forgetful, mindful))
    assert after < 0.5 * before
    assert (forgetful.diagnostics["earlier"], mindful.diagnostics["earlier"]) == (0, 2)
    assert mindful.diagnostics["facts"] == len(FACTS)


def test_a_fact_that_is_edited_again_is_not_held_where_it_was() -> None:
    again = FACTS[1].model_copy(update={"target_new": "Milan"})
    assert still_meant((again, *EARLIER), FACTS) == EARLIER


def test_a_small_l2_meets_the_values_as_far_as_the_free_space_reaches(tiny: ModelHandle) -> None:
    wanted, delta = wanted_of(tiny), solved(tiny, l2=1e-9)
    close = float((delta.update(LAYER).dense() @ stacked(wanted) - wanted.residuals).norm())
    assert close < 1e-4 * float(wanted.residuals.norm())
    assert float(solved(tiny, l2=1e9).update(LAYER).dense().norm()) < 1e-4


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9, 0.98, 0.999])
def test_the_free_space_is_the_largest_that_leaves_the_energy_alone(energy: float) -> None:
    space = free_space(MOMENT, energy)
    values = np.linalg.eigvalsh(metric().numpy())
    free = space.axes.shape[1]
    assert space.energy == pytest.approx(1 - values[:free].sum() / values.sum(), abs=1e-9)
    assert space.energy >= energy - 1e-12
    assert free == 64 or 1 - values[: free + 1].sum() / values.sum() < energy
    identity = torch.eye(free, dtype=torch.float64)
    torch.testing.assert_close(space.axes.T @ space.axes, identity, rtol=0, atol=1e-10)


def test_a_space_with_nothing_free_is_refused() -> None:
    with pytest.raises(SolveError, match="leaves no direction"):
        free_space(MOMENT, 1 - 1e-9)
    with pytest.raises(SolveError, match="no energy"):
        free_space(moment_of(torch.zeros(64, 64, dtype=torch.float64)), 0.5)


def test_live_edits_reach_the_editor_through_its_inputs(tiny_llama: ModelHandle) -> None:
    hparams = AlphaEditHparams(layer=LAYER, contexts=CONTEXTS, steps=3, preserved_energy=ENERGY, l2=0.1)
    first, second = (solve_alphaedit(tiny_llama, FACTS, hparams, inputs_of(past)) for past in ((), EARLIER))
    assert encode(first) != encode(second)


@pytest.mark.parametrize(
    "named", [{"preserved_energy": 1.0}, {"preserved_energy": -0.1}, {"l2": 0.0}, {"l2": "1"}]
)
def test_settings_outside_their_range_are_bad_requests(named: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match=next(iter(named))):
        AlphaEditHparams(**named)
