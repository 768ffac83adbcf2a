"""Many edits in a row on one layer: each stands on the one before, and they are undone in order."""

from __future__ import annotations

import pytest
from lineage_helpers import chained, counted
from pipeline_helpers import FACTS, Home, home, request_of, world

from guardedit.errors import OutOfOrderError
from guardedit.models import statistics
from guardedit.risk import banks

__all__ = ["home", "world"]

LINEAGE = {"postop/lineage_far_kl": ("<=", 100.0, "hard")}


def test_ten_edits_in_a_row_collect_nothing_and_are_undone_in_order(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(LINEAGE)
    first = guard.plan(request_of(0))
    gathered = counted(monkeypatch, statistics, "collect"), counted(monkeypatch, banks, "_text_keys")
    files = {
        path: path.stat().st_mtime_ns for path in (*home.world.kit.rglob("*"), *home.world.model.rglob("*"))
    }
    plans, audits = [first], [guard.apply(first.plan_id)]
    for number in range(1, len(FACTS)):
        plans.append(guard.plan(request_of(number)))
        audits.append(guard.apply(plans[-1].plan_id))
    assert gathered == ([], [])
    assert {path: path.stat().st_mtime_ns for path in files} == files
    chained(plans, audits)
    with pytest.raises(OutOfOrderError, match=plans[9].plan_id) as refused:
        guard.rollback(plans[3].plan_id)
    assert refused.value.exit_code == 8 and guard.state(plans[3].plan_id) == "committed"
    assert guard.verify()["versions"] == 10
    for plan in reversed(plans):
        assert guard.rollback(plan.plan_id).digest_after == plan.model_digest
    assert guard.handle.digest() == first.model_digest == home.guard().handle.digest()
    assert guard.verify()["versions"] == 20


def test_the_sum_of_small_edits_has_a_limit_of_its_own(home: Home) -> None:
    guard = home.guard()
    first = guard.plan(request_of(0))
    base = guard.apply(first.plan_id).drift
    assert base is not None
    limit = {"postop/lineage_target_p_new": ("<=", -1.0, "hard")}
    strict = home.guard(limit)
    audit = strict.apply(strict.plan(request_of(1)).plan_id)
    assert audit.outcome == "rolled-back" and audit.postop is not None
    failed = [f.metric for f in audit.postop.findings if f.verdict == "fail"]
    assert failed == ["postop/lineage_target_p_new"]
