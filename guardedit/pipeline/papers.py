"""The record as the view needs it: what a page says beside the report, and one reading of ledger and versions for many.

Reading the ledger checks its whole chain, which is right for a decision and too slow for a thousand pages: whoever
only tells the view reads it once and tells from that.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from guardedit.audit.desk.page import Terms
from guardedit.audit.ledger import Entry, Ledger
from guardedit.audit.lineage import Lineage
from guardedit.audit.versions import VersionStore
from guardedit.pipeline.history import History


class Papers:
    """What MLflow's pages and versions need of a home; see `audit.desk.telling.Material`."""

    def __init__(self, workspace: History) -> None:
        self._workspace = workspace

    def terms(self, plan_id: str) -> Terms:
        """What the policy asked of approvals when the plan was made."""
        asked = self._workspace.plan_entry(plan_id).body.get("demands", {})
        team = asked.get("profile") == "team"
        return Terms(
            hours=float(asked.get("approval_hours", Terms.hours)),
            approvals=int(asked.get("approvals", Terms.approvals)),
            signed=bool(asked.get("signed", team)),
        )

    def delta(self, plan_id: str) -> Path:
        """The file of the solved update."""
        return self._workspace.plan_folder(plan_id) / "delta.safetensors"

    def live(self) -> tuple[str, ...]:
        """Committed edits that stand, oldest first."""
        if not self._workspace.store.exists:
            return ()
        lineage = self._workspace.store.lineage()
        undone = {v.edit_id for v in lineage.versions if v.action == "roll-back"}
        return tuple(v.edit_id for v in lineage.versions if v.action == "edit" and v.edit_id not in undone)


class _ReadOnce(Ledger):
    """A ledger as it stood when this was made, its chain checked then."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.path)
        self._chain = ledger.entries()
        self._by_plan: dict[str | None, list[Entry]] = {}
        for entry in self._chain:
            self._by_plan.setdefault(entry.body.get("plan_id"), []).append(entry)

    def _checked(self) -> tuple[Entry, ...]:
        return self._chain

    def entries(
        self, kind: str | None = None, *, edit_id: str | None = None, plan_id: str | None = None
    ) -> tuple[Entry, ...]:
        """As a ledger's; a plan's are found without looking at all others."""
        if plan_id is None or edit_id is not None:
            return super().entries(kind, edit_id=edit_id, plan_id=plan_id)
        return tuple(one for one in self._by_plan.get(plan_id, ()) if kind in (None, one.kind))


class _SeenOnce(VersionStore):
    """Versions as they stood when they were first asked for."""

    @cached_property
    def _lineage(self) -> Lineage:
        return super().lineage()

    def lineage(self) -> Lineage:
        """Base and versions, read and checked once."""
        return self._lineage


def at_this_moment(workspace: History) -> History:
    """The same home, its ledger and versions read once: for telling, never for deciding."""
    still = History(workspace.settings, workspace.progress)
    still.ledger = _ReadOnce(workspace.ledger)
    still.store = _SeenOnce(workspace.home)
    return still
