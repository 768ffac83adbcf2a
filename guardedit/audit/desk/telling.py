"""What MLflow is told about an edit beside its runs: the page, the queue, the registered version, the saved views."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from guardedit.audit.desk import models, server, traces, views
from guardedit.audit.desk.page import Page, Terms, page_of, waits
from guardedit.audit.desk.reviews import Queue
from guardedit.audit.mlflow_content import milliseconds
from guardedit.audit.words import visible
from guardedit.records import AuditReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo
    from mlflow.tracing.client import TracingClient


class Material(Protocol):
    """What the record holds of an edit beside its report."""

    def terms(self, plan_id: str) -> Terms:
        """What the policy asks of approvals of this plan."""

    def delta(self, plan_id: str) -> Path:
        """The file of the solved update."""

    def live(self) -> tuple[str, ...]:
        """Committed edits that stand, oldest first."""


class Desk:
    """One connection's desk for one experiment. Everything is looked up when it is first needed, and once."""

    def __init__(
        self, client: MlflowClient, uri: str, experiment: str, model_name: str, material: Material | None
    ) -> None:
        self.client, self._uri, self.experiment = client, uri, experiment
        self._model_name, self._material = model_name, material
        self._changed = False

    @cached_property
    def tracing(self) -> TracingClient:
        """MLflow's client of traces, on the same store."""
        from mlflow.tracing.client import TracingClient

        return TracingClient(self._uri)

    @cached_property
    def queue(self) -> Queue:
        """The queue; the line under its question says whether answers count."""
        found = server.look(self._uri)
        return Queue(self.tracing, self.experiment, found.login if found else None)

    @cached_property
    def _pending(self) -> set[str]:
        return set(self.queue.items("pending"))

    @cached_property
    def _shelf(self) -> models.Shelf:
        return models.read(self.client, self._model_name)

    def page(self, audit: AuditReport) -> Page:
        """What a reviewer reads of this edit."""
        return page_of(audit, self._material.terms(audit.plan.plan_id) if self._material else Terms())

    def tell(self, audit: AuditReport, run: RunInfo) -> None:
        """Trace, registered version, queue. The queue comes last: it may need more rights than the rest."""
        if not self._changed:
            views.write(self.client, self.experiment)
        self._changed = True
        page = self.page(audit)
        at = milliseconds(audit.plan.created)
        traces.tell(self.tracing, self.experiment, page, at, _tags(audit), run.run_id)
        self._register(audit, run)
        if waits(audit):
            if page.trace_id not in self._pending:
                self.queue.put([page.trace_id])
        else:
            self._withdraw(audit, page)

    def finish(self) -> None:
        """Put the aliases where the ledger says, once everything is told."""
        if self._material is not None and self._changed:
            models.point(self.client, self._shelf, self._material.live())

    def _register(self, audit: AuditReport, run: RunInfo) -> None:
        committed = audit.outcome == "committed" or audit.plan.plan_id in self._shelf.versions
        if committed and self._material is not None:
            models.register(self.client, self._shelf, audit, self._material.delta(audit.plan.plan_id), run)

    def _withdraw(self, audit: AuditReport, page: Page) -> None:
        """Questions about this plan that nobody needs to answer any more; answered ones stay to be seen."""
        plain = page_of(audit.model_copy(update={"drift": None, "postop": None}), Terms()).trace_id
        open_ones = [one for one in dict.fromkeys((page.trace_id, plain)) if one in self._pending]
        if open_ones:
            self.queue.take_back(open_ones)


def _tags(audit: AuditReport) -> dict[str, str]:
    found = {
        "plan_id": audit.plan.plan_id,
        "state": audit.outcome,
        "plan_digest": audit.plan_digest,
        "editor": audit.plan.editor,
        "author": audit.plan.author,
    }
    return {f"guardedit.{name}": visible(value)[:4000] for name, value in found.items()}
