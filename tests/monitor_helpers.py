"""A reference side on a tiny model, and what the monitor measures against it."""

from __future__ import annotations

from pathlib import Path

import pytest
from drift_helpers import LAYER, make_probes, make_saes

from guardedit.drift.measure import base_side, measure_drift
from guardedit.drift.probes import ProbeSet
from guardedit.drift.sides import BaseSide
from guardedit.edits.deltas import EditDelta
from guardedit.models.handle import ModelHandle
from guardedit.records import DriftReport

Sides = tuple[ProbeSet, BaseSide]


def record_base(handle: ModelHandle, layer: int = LAYER, cache: Path | None = None) -> Sides:
    probes = make_probes(handle)
    return probes, base_side(handle, probes, layer, tuple(make_saes()), cache=cache)


@pytest.fixture
def sides(tiny_llama: ModelHandle) -> Sides:
    return record_base(tiny_llama)


def measured(handle: ModelHandle, sides: Sides, change: EditDelta | None, **options: object) -> DriftReport:
    return measure_drift(handle, sides[1], sides[0], make_saes(), change=change, **options)  # type: ignore[arg-type]


def value(report: DriftReport, name: str) -> float:
    score = report.score(name)
    assert score is not None, name
    assert score.value is not None, (name, score.reason)
    return score.value
