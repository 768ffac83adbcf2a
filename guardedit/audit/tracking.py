"""MLflow as a view of the ledger: one run a plan, child runs for pre-op, edit and post-op; `sync` can rebuild it.

Nothing here decides anything. MLflow being away raises TrackingError within seconds; callers record it and go on.
Timestamps come from the record, names from the plan, so telling the same story twice changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock

from guardedit.audit import mlflow_content as content
from guardedit.audit import mlflow_runs as runs
from guardedit.audit.desk.telling import Desk, Material
from guardedit.audit.files import make_folder
from guardedit.audit.mlflow_store import LOCK_SECONDS, connected, prepare
from guardedit.errors import GuardeditError, TrackingError
from guardedit.records import AuditReport

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Story", "SyncResult", "Tracker", "experiment_name", "prepare"]

VIEW = "3"
"""Form of what is told: a plan that was told in an older one is told again."""
LOT = 20
"""Plans that `sync` tells before it lets others in."""
_PLAN_ID = re.compile(r"[\w.:-]{1,200}")


class Entry(Protocol):
    """What is needed of a ledger entry."""

    @property
    def seq(self) -> int: ...
    @property
    def body(self) -> dict[str, Any]: ...


class EntrySource(Protocol):
    """What is needed of a ledger."""

    def entries(self) -> Iterable[Entry]: ...


@dataclass(frozen=True)
class SyncResult:
    """What `sync` did: plans told for the first time, told anew, and left `behind` (`notes` say why)."""

    created: int
    updated: int
    behind: int
    notes: tuple[str, ...] = ()

    def with_(self, other: SyncResult) -> SyncResult:
        """Both together."""
        counts = self.created + other.created, self.updated + other.updated, self.behind + other.behind
        return SyncResult(*counts, (*self.notes, *other.notes))


@dataclass(frozen=True)
class Story:
    """An edit to be told, and the folder of its rendered report where there is one.

    `write` renders it instead, once the record can name its run; None where it could not.
    """

    audit: AuditReport
    report_dir: Path | None = None
    write: Callable[[AuditReport], Path | None] | None = None

    def in_run(self, run_id: str) -> Story:
        """The same, its record naming the run and its report written."""
        if self.write is None:
            return self
        named = self.audit.model_copy(update={"mlflow_run_id": run_id})
        return Story(named, self.write(named))


class Tracker:
    """Writes the view. Making one does nothing yet; every method raises TrackingError when MLflow is away.

    `uri` is a database's (`sqlite:///…`, `postgresql://…`) or a server's; a database's artifacts lie under
    `artifact_root`. Without `material` no versions are registered, and pages say what a policy asks for by default.
    """

    def __init__(self, uri: str, artifact_root: Path, material: Material | None = None) -> None:
        self.uri = uri
        self.artifact_root = artifact_root
        self._material = material
        # One lock object: whoever holds it may ask for it again, as a lot does that opens runs while it is told.
        self._lock = FileLock(artifact_root / ".tracking.lock", timeout=LOCK_SECONDS)

    def open_run(self, audit: AuditReport) -> str:
        """The run of a plan, created empty if there is none, so that a report can name it before it is logged."""
        _require_searchable(audit.plan.plan_id)
        with self._alone() as client:
            experiment = self._experiment(client, audit.plan.model_name)
            known = runs.find_runs(client, experiment, audit.plan.plan_id)
            return str(runs.run_of(client, experiment, audit, "plan", known).info.run_id)

    def log_audit(
        self, audit: AuditReport, report_dir: Path | None = None, ledger_seq: int | None = None
    ) -> str:
        """Tell MLflow everything about one edit; returns the plan's run id. Telling it again changes nothing.

        `report_dir` holds the rendered report.*; without it they are rendered anew. `ledger_seq` is the last ledger
        entry that the record rests on.
        """
        _require_searchable(audit.plan.plan_id)
        with self._alone() as client:
            desk = self._desk(client, audit.plan.model_name)
            told = self._tell(client, desk, Story(audit, report_dir), ledger_seq)
            desk.finish()
            return told[0]

    def sync(
        self, ledger: EntrySource, load_report: Callable[[str], AuditReport | Story | None]
    ) -> SyncResult:
        """Bring MLflow to where the ledger is. `load_report` is given a plan id.

        A plan whose record cannot be read, or is not there yet, is counted as behind and does not stop the others.
        Plans are told in small lots: somebody else who has something to tell waits for one lot, not for all.
        """
        with connected(self.uri) as client:
            known = _known_seqs(client)
        late = [(plan, seq) for plan, seq in last_entries(ledger).items() if known.get(plan, -1) < seq]
        done = SyncResult(0, 0, 0)
        for start in range(0, len(late), LOT):
            done = done.with_(self.tell(late[start : start + LOT], load_report))
        return done

    def behind(self, ledger: EntrySource) -> int:
        """How many plans of the ledger MLflow does not show as they stand."""
        with connected(self.uri) as client:
            known = _known_seqs(client)
        return sum(known.get(plan_id, -1) < seq for plan_id, seq in last_entries(ledger).items())

    @contextmanager
    def at_desk(self, model_name: str) -> Iterator[tuple[str, Desk]]:
        """The experiment's id and the desk of a model, while nobody else writes."""
        with self._alone() as client:
            yield self._experiment(client, model_name), self._desk(client, model_name)

    def tell(
        self, late: list[tuple[str, int]], load_report: Callable[[str], AuditReport | Story | None]
    ) -> SyncResult:
        """Tell these plans, each with the number of the last ledger entry that its record rests on."""
        created, updated, notes = 0, 0, []
        desks: dict[str, Desk] = {}
        with self._alone() as client:
            for plan_id, seq in late:
                story, problem = _loaded(load_report, plan_id)
                if story is None:
                    notes.append(f"{plan_id}: {problem}")
                    continue
                name = story.audit.plan.model_name
                if name not in desks:
                    desks[name] = self._desk(client, name)
                desk = desks[name]
                _, made = self._tell(client, desk, story, seq)
                created, updated = created + made, updated + (not made)
            for desk in desks.values():
                desk.finish()
        return SyncResult(created, updated, len(notes), tuple(notes))

    def _tell(self, client: MlflowClient, desk: Desk, story: Story, seq: int | None) -> tuple[str, bool]:
        """The run's id, and whether it is told for the first time."""
        audit, experiment = story.audit, desk.experiment
        record, place = content.fingerprint(audit), {} if seq is None else {"guardedit.ledger_seq": str(seq)}
        known = runs.find_runs(client, experiment, audit.plan.plan_id)
        parent = runs.run_of(client, experiment, audit, "plan", known)
        story, tags = story.in_run(parent.info.run_id), parent.data.tags
        audit = story.audit
        if (tags.get("guardedit.record"), tags.get("guardedit.view")) != (record, VIEW):
            runs.fill(client, parent, audit, story.report_dir)
            for stage in content.stages_of(audit):
                child = runs.run_of(client, experiment, audit, stage, known, parent)
                runs.fill_stage(client, child, audit, stage)
            desk.tell(audit, parent.info)
        # The marks come last: a run without them was interrupted, and is told again.
        runs.mark(client, parent, {"guardedit.record": record, "guardedit.view": VIEW, **place})
        return str(parent.info.run_id), "guardedit.record" not in tags

    def _desk(self, client: MlflowClient, model_name: str) -> Desk:
        return Desk(client, self.uri, self._experiment(client, model_name), model_name, self._material)

    def _experiment(self, client: MlflowClient, model_name: str) -> str:
        name = experiment_name(model_name)
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow's experiment {name!r} was deleted; restore it and run `guardedit sync`"
            )
        if found is not None:
            return str(found.experiment_id)
        # A database that is written directly keeps no files; only a server says itself where they go.
        local = not self.uri.startswith(("http://", "https://"))
        where = (self.artifact_root.absolute() / "artifacts").as_uri() if local else None
        return str(client.create_experiment(name, artifact_location=where))

    @contextmanager
    def _alone(self) -> Iterator[MlflowClient]:
        """Connected, and the only writer: two at once would create a plan's run twice."""
        with connected(self.uri) as client:
            make_folder(self.artifact_root)
            with self._lock:
                yield client


def experiment_name(model_name: str) -> str:
    """The experiment of a model: "guardedit/smollm2-135m"."""
    return f"guardedit/{model_name}"


def last_entries(ledger: EntrySource) -> dict[str, int]:
    """The number of each plan's last ledger entry, in the order in which plans appear."""
    plan_of_edit: dict[str, str] = {}
    last: dict[str, int] = {}
    for entry in ledger.entries():
        plan, edit = entry.body.get("plan_id"), entry.body.get("edit_id")
        if isinstance(plan, str) and isinstance(edit, str):
            plan_of_edit[edit] = plan
        plan = plan or plan_of_edit.get(str(edit))
        if isinstance(plan, str):
            last[plan] = entry.seq
    return last


def _require_searchable(plan_id: str) -> None:
    if not _PLAN_ID.fullmatch(plan_id):
        raise TrackingError(
            f"plan id {plan_id!r} cannot be searched for in MLflow; letters, digits and -_.: can"
        )


def _loaded(
    load_report: Callable[[str], AuditReport | Story | None], plan_id: str
) -> tuple[Story | None, str]:
    try:
        _require_searchable(plan_id)
        found = load_report(plan_id)
        return Story(found) if isinstance(found, AuditReport) else found, "there is no report of it yet"
    except (GuardeditError, TrackingError) as error:
        return None, str(error)


def _known_seqs(client: MlflowClient) -> dict[str, int]:
    """The last ledger entry that each plan's run tells of."""
    experiments = [
        e.experiment_id for e in client.search_experiments(filter_string="name LIKE 'guardedit/%'")
    ]
    found: dict[str, int] = {}
    token: str | None = None
    while experiments:
        page = client.search_runs(
            experiments, "tags.`guardedit.stage` = 'plan'", max_results=1000, page_token=token
        )
        for run in page:
            tags = run.data.tags
            told = tags.get("guardedit.view") == VIEW
            found[tags["guardedit.plan_id"]] = int(tags.get("guardedit.ledger_seq", -1)) if told else -1
        token = page.token
        if not token:
            break
    return found
