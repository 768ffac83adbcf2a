"""Bytes that somebody changed under a plan, a copy, a version or the ledger: seen, and nothing changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_helpers import LIMITS, UNDECIDED, Home, flipped, home, request_of, world

from guardedit.errors import GuardeditError, IntegrityError

__all__ = ["home", "world"]


def some_offsets(path: Path, n: int = 1) -> list[int]:
    size = path.stat().st_size
    return [0, size - 1, *random.Random(path.name).sample(range(size), min(n, size))]


def refused(home: Home, plan_id: str, path: Path, limits: Any = None) -> None:
    """Each flip is an IntegrityError when the plan is applied, and nothing changes."""
    for offset in some_offsets(path):
        with flipped(path, offset):
            before = home.trace()
            with pytest.raises(IntegrityError) as caught:
                home.guard(limits).apply(plan_id)
            assert caught.value.exit_code == 6
            assert home.trace() == before, (path.name, offset)


def test_a_byte_changed_in_anything_that_a_plan_rests_on_stops_it(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    own = [guard.plan_folder(plan.plan_id) / name for name in ("plan.json", "delta.safetensors")]
    files = (
        "sae_weights.safetensors",
        "cfg.json",
        "card.json",
        "labels.json",
        "stats.safetensors",
        "digests.json",
    )
    theirs = [home.world.moment, home.world.kit / "policy.toml", home.world.kit / "kit.json"]
    for path in (
        *own,
        *theirs,
        *(home.world.saes[1] / name for name in files),
        home.world.saes[0] / files[0],
    ):
        refused(home, plan.plan_id, path)
    assert home.guard().apply(plan.plan_id).outcome == "committed"


def test_a_byte_changed_in_a_held_copy_stops_its_commit(home: Home) -> None:
    guard = home.guard(UNDECIDED)
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    guard.approve(plan.plan_id, "looked at the report")
    for path in sorted((home.folder / "model" / "staged").rglob("*.*")):
        if path.is_file():
            refused(home, plan.plan_id, path, UNDECIDED)
    assert home.guard(UNDECIDED).apply(plan.plan_id).outcome == "committed"


def test_a_byte_changed_in_a_committed_edit_stops_its_undo(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    live = guard.apply(plan.plan_id).digest_after
    for path in sorted((home.folder / "model" / "versions").rglob("*.*")):
        for offset in some_offsets(path) if path.is_file() else ():
            with flipped(path, offset):
                before = home.trace()
                for step in (lambda: home.guard().rollback(plan.plan_id), lambda: home.guard().verify()):
                    with pytest.raises(IntegrityError):
                        step()
                assert home.trace() == before
    assert home.guard().store.digest() == live
    assert home.guard().rollback(plan.plan_id).digest_after == plan.model_digest


def test_an_older_pointer_put_back_is_seen_although_every_record_is_genuine(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of())
    pointer = home.folder / "model" / "CURRENT"
    before = pointer.read_bytes()
    guard.apply(plan.plan_id)
    pointer.write_bytes(before)
    with pytest.raises(IntegrityError, match="committed in the ledger"):
        home.guard().verify()


@pytest.fixture
def told(home: Home) -> Home:
    """A home whose ledger tells of a plan and its commit."""
    guard = home.guard()
    guard.apply(guard.plan(request_of()).plan_id)
    return home


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_no_byte_of_the_ledger_can_change_what_a_reader_reads(told: Home, share: float, mask: int) -> None:
    path = told.folder / "ledger.sqlite"
    truth = [vars(entry) for entry in told.guard().ledger.entries()]
    status = told.guard().status()
    with flipped(path, int(share * path.stat().st_size), mask):
        try:
            assert [vars(entry) for entry in told.guard().ledger.entries()] == truth
            assert told.guard().status() == status
        except GuardeditError as error:
            assert isinstance(error, IntegrityError)
    assert LIMITS and told.guard().status() == status
