"""A guarded model with all its verbs, and how one is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardedit.audit.export import export
from guardedit.config import Settings
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import (
    anchoring,
    applying,
    deciding,
    planning,
    reading,
    recovery,
    replanning,
    reporting,
    upkeep,
)
from guardedit.pipeline.workspace import Progress
from guardedit.pipeline.workspace import Workspace as _Workspace
from guardedit.records import AuditReport, Decision, EditRequest, Plan, Waiver

__all__ = ["Guard", "load", "open"]

Asked = EditRequest | Mapping[str, Any]
"""A request, or a mapping of its fields."""


class Guard(_Workspace):
    """A guarded model with all its verbs."""

    def plan(
        self,
        requests: Asked | Sequence[Asked],
        editor: str = "rome",
        waivers: Sequence[Waiver] = (),
        hparams: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Solve, measure and judge one request, or many as one edit; see `planning.make_plan`."""
        if isinstance(requests, EditRequest | Mapping):
            return planning.make_plan(self, _read(requests, "the request"), editor, waivers, hparams)
        asked = [_read(one, f"request {number}") for number, one in enumerate(requests, start=1)]
        return planning.make_plan(self, asked, editor, waivers, hparams)

    def waive(self, plan_id: str, waivers: Sequence[Waiver]) -> Plan:
        """Judge a plan again with waivers; see `planning.waive`."""
        return planning.waive(self, plan_id, waivers)

    def replan(self, *plan_ids: str) -> tuple[replanning.Replanned, ...]:
        """Make plans anew on today's model, all that are due where none is named; see `replanning.replan`."""
        return replanning.replan(self, plan_ids)

    def approve(
        self,
        plan_id: str,
        reason: str,
        approver: str | None = None,
        emergency: deciding.Emergency | None = None,
    ) -> Decision:
        """A person's yes, bound to the plan's digest; `emergency` lifts a policy's block."""
        return deciding.decide_plan(self, plan_id, "approved", reason, approver, emergency)

    def reject(self, plan_id: str, reason: str, approver: str | None = None) -> Decision:
        """A person's no."""
        return deciding.decide_plan(self, plan_id, "rejected", reason, approver)

    def apply(self, plan_id: str) -> AuditReport:
        """Stage, monitor, then commit or drop; see `applying.apply_plan`."""
        return applying.apply_plan(self, plan_id)

    def rollback(self, edit_id: str, reason: str = "asked for") -> AuditReport:
        """Undo a committed edit bit for bit; see `applying.undo`."""
        return applying.undo(self, edit_id, reason)

    def report(self, edit_id: str) -> reporting.Published:
        """Write the edit's report and its MLflow run."""
        return reporting.publish(self, edit_id)

    def sync(self) -> dict[str, Any]:
        """Bring MLflow to what the ledger says."""
        return reporting.sync(self)

    def verify(self, anchor: Path | None = None) -> dict[str, Any]:
        """Recompute every digest from bytes, and hold the ledger to a checkpoint; see `upkeep.verify`."""
        held_to = anchoring.verify_anchor(self, anchor) if anchor else {}
        return {**upkeep.verify(self), **held_to}

    def recover(self) -> dict[str, Any]:
        """Finish or drop what a crash left; see `recovery.recover`."""
        found = recovery.recover(self)
        self.refresh()
        return found

    def status(self) -> dict[str, Any]:
        """What is live and where every plan stands; reads no model."""
        return upkeep.status(self)

    def export(self, folder: Path) -> Path:
        """The live model as a plain Hugging Face folder."""
        export(self.store, folder)
        return folder


def _read(request: Asked, where: str) -> EditRequest:
    return request if isinstance(request, EditRequest) else reading.read_request(dict(request), where)


def open(
    model: str = "smollm2-135m",
    home: str | Path = ".guardedit",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Guard:
    """A workspace for `model` (a known name, a folder or a hub id) under `home`; nothing is read or made yet."""
    return Guard(Settings(model=model, home=Path(home), **settings), progress)


def load(home: str | Path = ".guardedit") -> ModelHandle:
    """The live model of a home: base plus committed edits, every digest compared.

    Raises NotFoundError where the home guards no model, IntegrityError where bytes were changed.
    """
    guard = Guard(Settings(home=Path(home)))
    return upkeep.load_live(guard)
