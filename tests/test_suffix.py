"""The end of a row computed from remembered keys and values is the end of the whole row, and so are its gradients."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from edits_helpers import gaussian
from torch import Tensor

from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import mlp_hook, patch
from guardedit.models.suffix import Suffix, split_rows

LENGTHS = (9, 4, 7, 12)
SPLITS = {
    "various": (2, 3, 6, 0),
    "all at the start": (0, 0, 0, 0),
    "all at one place": (3, 3, 3, 3),
    "all at the last token": (8, 3, 6, 11),
    "one row without a past": (0, 1, 5, 10),
}
LAYERS = (0, 2, 3)


def rows_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 380) for _ in range(length)] for length in lengths]


def full(handle: ModelHandle, row: list[int]) -> Tensor:
    """(seq, d_model): one row alone, without padding, cache or resume."""
    ids = torch.tensor([row])
    states: Tensor = handle.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states[0]


def adding(residual: Tensor, at: int) -> Callable[[Tensor], Tensor]:
    """A patch function that adds `residual` at one position of every row."""

    def add(output: Tensor) -> Tensor:
        where = torch.zeros(output.shape[1], 1)
        where[at] = 1.0
        return output + where * residual

    return add


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_end_of_a_row_is_the_end_of_the_whole_row(tiny: ModelHandle, name: str, layer: int) -> None:
    rows, splits = rows_of(LENGTHS), SPLITS[name]
    with torch.no_grad():
        suffix = split_rows(tiny, rows, splits, layer)
        hidden = suffix.hidden()
        for index, (row, split) in enumerate(zip(rows, splits, strict=True)):
            assert suffix.mask[index].sum() == len(row) - split
            found = hidden[index, : len(row) - split]
            # The same sums over another padding, in float32.
            torch.testing.assert_close(found, full(tiny, row)[split:], rtol=1e-4, atol=1e-4)


def gradient_by_suffix(suffix: Suffix, layer: int, pull: Tensor) -> tuple[Tensor, Tensor]:
    residual = torch.zeros(suffix.handle.d_model, requires_grad=True)
    with patch(suffix.handle, mlp_hook(layer), adding(residual, 0)):
        hidden = suffix.hidden()
    loss = (hidden * suffix.mask[..., None]).sum((0, 1)).dot(pull)
    return loss.detach(), torch.autograd.grad(loss, residual)[0]


def gradient_by_full(
    handle: ModelHandle, rows: list[list[int]], splits: tuple[int, ...], layer: int, pull: Tensor
) -> tuple[Tensor, Tensor]:
    residual = torch.zeros(handle.d_model, requires_grad=True)
    loss = torch.zeros(())
    for row, split in zip(rows, splits, strict=True):
        with patch(handle, mlp_hook(layer), adding(residual, split)):
            loss = loss + full(handle, row)[split:].sum(0).dot(pull)
    return loss.detach(), torch.autograd.grad(loss, residual)[0]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_the_whole_forward_pass(tiny: ModelHandle, name: str, layer: int) -> None:
    rows, splits, pull = rows_of(LENGTHS, 1), SPLITS[name], gaussian(tiny.d_model).float()
    with preserved(tiny):
        suffix = split_rows(tiny, rows, splits, layer)
        loss, gradient = gradient_by_suffix(suffix, layer, pull)
        naive_loss, naive = gradient_by_full(tiny, rows, splits, layer, pull)
    assert float(naive.norm()) > 0.1, "there must be a gradient to compare"
    assert float((gradient - naive).norm() / naive.norm()) < 1e-4
    torch.testing.assert_close(loss, naive_loss, rtol=1e-4, atol=1e-3)


def test_a_run_does_not_use_up_what_is_remembered(tiny: ModelHandle) -> None:
    """A forward pass appends to the cache that it is given: each run must get a fresh one."""
    with torch.no_grad():
        suffix = split_rows(tiny, rows_of(LENGTHS), SPLITS["various"], 2)
        shapes = [keys.shape for keys, _ in suffix.past]
        first, second, third = (suffix.hidden() for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third)
    assert [keys.shape for keys, _ in suffix.past] == shapes


def test_rows_without_any_past_need_no_cache(tiny: ModelHandle) -> None:
    with torch.no_grad():
        suffix = split_rows(tiny, rows_of(LENGTHS), (0, 0, 0, 0), 1)
    assert suffix.past == ()
    assert suffix.input_ids.shape == (4, max(LENGTHS))


def test_a_late_split_beside_a_long_rest_stays_inside_the_model_s_context(tiny: ModelHandle) -> None:
    """Padding behind the late split would else get positions beyond a learned position embedding."""
    length = tiny.context_length
    rows, splits = rows_of((length, length - 56)), (length - 6, 0)
    with torch.no_grad():
        hidden = split_rows(tiny, rows, splits, 2).hidden()
        torch.testing.assert_close(hidden[0, :6], full(tiny, rows[0])[-6:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hidden[1, : length - 56], full(tiny, rows[1]), rtol=1e-4, atol=1e-4)


def test_preparing_and_running_leave_no_trace_and_ask_for_no_gradient(tiny: ModelHandle) -> None:
    with preserved(tiny):
        suffix = split_rows(tiny, rows_of(LENGTHS), SPLITS["various"], 2)
        assert not suffix.resid_pre.requires_grad
        assert not any(part.requires_grad for pair in suffix.past for part in pair)
        assert not suffix.hidden().requires_grad
