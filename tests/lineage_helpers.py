"""What the tests of many edits in a row share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from guardedit.records import AuditReport, Plan


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Names of the calls of a function, which still does its work."""
    calls: list[str] = []
    original: Callable[..., Any] = getattr(owner, name)

    def count(*args: Any, **named: Any) -> Any:
        calls.append(name)
        return original(*args, **named)

    patch.setattr(owner, name, count)
    return calls


def chained(plans: list[Plan], audits: list[AuditReport]) -> None:
    """Each edit stands on the one before; from the second on, drift against the base stands beside the step's."""
    assert len({plan.delta.changes[0].parameter for plan in plans}) == 1
    for plan, before in zip(plans[1:], audits, strict=False):
        assert plan.model_digest == before.digest_after and plan.base_digest == plans[0].model_digest
    assert all(audit.outcome == "committed" and audit.drift is not None for audit in audits)
    assert audits[0].drift_base is None
    for audit in audits[1:]:
        assert audit.drift is not None and audit.drift_base is not None and audit.postop is not None
        assert (audit.drift.reference, audit.drift_base.reference) == ("previous", "base")
        judged = {finding.metric: finding.value for finding in audit.postop.findings}
        total = audit.drift_base.score("far_kl")
        assert total is not None and judged["postop/lineage_far_kl"] == total.value
    step, total = audits[-1].drift, audits[-1].drift_base
    assert step is not None and total is not None
    assert step.score("far_kl") != total.score("far_kl")
