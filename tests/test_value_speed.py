"""The reading of the value loop's rate: FLOPs are those of the products, and the loop asks for no weight gradients."""

from __future__ import annotations

import pytest
import torch

from benchmarks.value_speed import counted, product_rate, timed
from guardedit.edits.value_types import Value


def _passes(rows: int, inner: int, outer: int) -> int:
    """FLOPs of one layer, forward and backward to its input, counted by the benchmark."""
    x = torch.randn(rows, inner, requires_grad=True)
    weight = torch.randn(inner, outer)
    return counted(lambda: (x @ weight).sum().backward())


def test_forward_and_the_gradient_by_activations_are_counted_and_no_more() -> None:
    assert _passes(3, 5, 7) == 2 * (2 * 3 * 5 * 7)


def test_a_share_is_the_loops_flops_over_the_machines_in_the_same_seconds() -> None:
    x = torch.randn(600, 600)

    def loop() -> tuple[Value, ...]:
        for _ in range(20):
            x @ x
        value = Value(torch.zeros(1), losses=(2.0, 1.0, 0.5), kl_nats=0.0, p_new=0.5, clamped=False)
        return (value, value)

    row = timed(loop)
    assert row["n"] == 2 and row["steps"] == 2.0
    assert row["gflop_a_value"] == 20 * 2 * 600**3 / 2 / 1e9
    assert row["share"] == pytest.approx(row["gflop_a_cpu_s"] / row["product_gflop_a_cpu_s"])
    assert product_rate() > 0
