"""Many requests, each screened from its key alone before any of them is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guardedit.gate.policy import judge
from guardedit.gate.screening import screened
from guardedit.models.handle import preserved
from guardedit.pipeline.measuring import risk_contexts
from guardedit.pipeline.workspace import Workspace
from guardedit.records import EditRequest, Screened, Waiver
from guardedit.risk.key_stage import KEY_SCORES, key_scores
from guardedit.risk.key_view import KeyView, fill_surprises, views_of

SHOWN = ("key_leakage", "key_near_interference")
"""Scores that every row of a screening gives, whatever the policy limits."""


@dataclass(frozen=True)
class Screening:
    """All requests with what the policy said of each."""

    views: tuple[KeyView, ...]
    rows: tuple[Screened, ...]

    @property
    def passed(self) -> tuple[KeyView, ...]:
        """The requests that may be solved."""
        return tuple(view for view, row in zip(self.views, self.rows, strict=True) if not row.stopped)

    @property
    def stopped(self) -> tuple[EditRequest, ...]:
        """The requests that the policy stops."""
        return tuple(view.request for view, row in zip(self.views, self.rows, strict=True) if row.stopped)


def screen(
    workspace: Workspace, requests: Sequence[EditRequest], layer: int, waivers: Sequence[Waiver]
) -> Screening:
    """Measure each request's key and judge it by the policy's rules with `stage = "key"`; waivers count as ever."""
    policy, now = workspace.kit.policy, workspace.now()
    context = risk_contexts(workspace, (layer,))[layer]
    names = {rule.metric.removeprefix("preop/") for rule in policy.rules_for("key", "many")} & set(KEY_SCORES)
    rows = []
    with preserved(workspace.handle):
        views = views_of(context, requests)
        if names & {"conflict_old_nats", "conflict_new_nats"}:
            fill_surprises(views)
        for view in views:
            scores = key_scores(view, names | set(SHOWN))
            rows.append(screened(view.request, scores, judge(scores, policy, waivers, "key", now, "many")))
    return Screening(views, tuple(rows))
