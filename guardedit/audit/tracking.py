"""MLflow as a view of the ledger: one run a plan, child runs for pre-op, edit and post-op. It can be rebuilt by `sync`.

Nothing here decides anything. MLflow being away raises TrackingError within seconds, which callers record and pass over.
Timestamps come from the record, names from the plan, so telling the same story twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlparse

from filelock import FileLock

from guardedit.audit import mlflow_content as content
from guardedit.audit.files import make_folder, publish_file
from guardedit.audit.plots import draw
from guardedit.audit.report import render, sheet_of
from guardedit.errors import GuardeditError, TrackingError
from guardedit.records import AuditReport, canonical

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOCK_SECONDS = 60.0
_PLAN_ID = re.compile(r"[\w.:-]{1,200}")
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_HTTP = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""MLflow's own are 7 retries and 120 s: four minutes of waiting for a server that is down."""


class Entry(Protocol):
    """What is needed of a ledger entry."""

    @property
    def seq(self) -> int: ...
    @property
    def at(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def body(self) -> dict[str, Any]: ...


class EntrySource(Protocol):
    """What is needed of a ledger."""

    def entries(self) -> Iterable[Entry]: ...


@dataclass(frozen=True)
class SyncResult:
    """What `sync` did. `behind` plans are in the ledger and not (wholly) in MLflow; `notes` say why."""

    created: int
    updated: int
    behind: int
    notes: tuple[str, ...] = ()


@contextmanager
def _environment(uri: str) -> Iterator[None]:
    """MLflow's switches while it is used, and as they were afterwards. What the user set himself stays, but telemetry."""
    wanted = dict(_ENVIRONMENT)
    if uri.startswith("http"):
        wanted |= {k: v for k, v in _HTTP.items() if k not in os.environ}
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn everything that MLflow raises when it cannot do its work into one TrackingError."""
    import mlflow.exceptions
    import sqlalchemy.exc

    try:
        yield
    except (
        mlflow.exceptions.MlflowException,
        sqlalchemy.exc.SQLAlchemyError,
        sqlite3.Error,
        OSError,
    ) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TrackingError(
            f"MLflow at {_public(uri)} did not answer: {first}. Run `guardedit sync` when it is back"
        ) from error


def _public(uri: str) -> str:
    """The URI without user name and password."""
    parts = urlparse(uri)
    return uri.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2]) if "@" in parts.netloc else uri


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def prepare(uri: str) -> None:
    """Create MLflow's SQLite database if it is missing: 6 to 10 s, safe beside other processes, a crash leaves nothing.

    Nothing to do for a server, or when the file is there. Raises TrackingError.
    """
    path = _sqlite_file(uri)
    if path is None or (path.exists() and path.stat().st_size):
        return
    with _environment(uri), _translated(uri):
        make_folder(path.parent)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS):
            if not path.exists() or not path.stat().st_size:
                _migrate(path)


def _migrate(path: Path) -> None:
    """Build the tables in a file beside it, then rename: nobody ever sees half a database."""
    import mlflow.store.db.utils as database
    import sqlalchemy

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder, _quiet():
        fresh = Path(folder) / path.name
        engine = sqlalchemy.create_engine(f"sqlite:///{fresh}")
        try:
            # MLflow runs its migrations on first use only from inside its store; this is the same call.
            database._initialize_tables(engine)
        finally:
            engine.dispose()
        publish_file(fresh, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Sixty lines of migrations are not news."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    saved = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in saved:
            logger.setLevel(level)


class Tracker:
    """Writes the view. Making one does nothing yet; every method raises TrackingError when MLflow is away.

    `uri` is `sqlite:///…` or a server's address; artifacts of a SQLite store lie under `artifact_root`.
    """

    def __init__(self, uri: str, artifact_root: Path) -> None:
        self.uri = uri
        self.artifact_root = artifact_root

    def run_id(self, plan_id: str, model_name: str) -> str | None:
        """The run of a plan, or None; for links."""
        with self._client() as client:
            experiment = client.get_experiment_by_name(experiment_name(model_name))
            found = _find(client, experiment.experiment_id, plan_id) if experiment else {}
            return found["plan"].info.run_id if "plan" in found else None

    def open_run(self, audit: AuditReport) -> str:
        """The run of a plan, created empty if there is none: so that a report can name it before it is logged."""
        with self._client() as client:
            experiment = self._experiment(client, audit.plan.model_name)
            return _run(
                client, experiment, audit, "plan", _find(client, experiment, audit.plan.plan_id)
            ).info.run_id

    def log_audit(
        self, audit: AuditReport, report_dir: Path | None = None, ledger_seq: int | None = None
    ) -> str:
        """Tell MLflow everything about one edit; returns the plan's run id. Telling it again changes nothing.

        `report_dir` holds the rendered report.*; without it they are rendered anew. `ledger_seq` is the last ledger
        entry that the record rests on.
        """
        return self._log(audit, report_dir, ledger_seq)[0]

    def sync(self, ledger: EntrySource, load_report: Callable[[str], AuditReport | None]) -> SyncResult:
        """Bring MLflow to where the ledger is. `load_report` is given a plan id.

        A plan whose record cannot be read, or is not there yet, is counted as behind and does not stop the others.
        """
        with self._client():
            pass  # say at once that MLflow is away, before reports are loaded
        created, updated, notes = 0, 0, []
        for plan_id, seq in last_entries(ledger).items():
            try:
                audit = load_report(plan_id)
            except GuardeditError as error:
                notes.append(f"{plan_id}: {error}")
                continue
            if audit is None:
                notes.append(f"{plan_id}: no report yet")
                continue
            _, made, changed = self._log(audit, None, seq)
            created, updated = created + made, updated + (changed and not made)
        return SyncResult(created, updated, len(notes), tuple(notes))

    def behind(self, ledger: EntrySource) -> int:
        """How many plans of the ledger MLflow does not show as they stand."""
        with self._client() as client:
            known = _known_seqs(client)
        return sum(known.get(plan_id, -1) < seq for plan_id, seq in last_entries(ledger).items())

    def _log(self, audit: AuditReport, report_dir: Path | None, seq: int | None) -> tuple[str, bool, bool]:
        """Run id, whether it was created, whether anything was written."""
        if not _PLAN_ID.fullmatch(audit.plan.plan_id):
            raise TrackingError(
                f"plan id {audit.plan.plan_id!r} cannot be searched for in MLflow; letters, digits and -_.: can"
            )
        with self._client() as client, FileLock(self.artifact_root / ".tracking.lock", timeout=LOCK_SECONDS):
            experiment = self._experiment(client, audit.plan.model_name)
            known = _find(client, experiment, audit.plan.plan_id)
            marks = {"guardedit.record": content.fingerprint(audit)} | (
                {"guardedit.ledger_seq": str(seq)} if seq else {}
            )
            if "plan" in known and _is_told(known["plan"], marks):
                return known["plan"].info.run_id, False, False
            parent = _run(client, experiment, audit, "plan", known)
            _fill(client, parent.info.run_id, audit, report_dir)
            for stage in content.stages_of(audit):
                _fill_stage(client, _run(client, experiment, audit, stage, known, parent), audit, stage)
            # The marks come last: a run without them was interrupted and is told again.
            client.log_batch(parent.info.run_id, tags=_tags(marks))
            _close(client, parent, content.status_of(audit), audit)
            return parent.info.run_id, "plan" not in known, True

    def _experiment(self, client: MlflowClient, model_name: str) -> str:
        name = experiment_name(model_name)
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow's experiment {name!r} was deleted; restore it, then run `guardedit sync`"
            )
        if found is not None:
            return str(found.experiment_id)
        local = _sqlite_file(self.uri) is not None
        where = (self.artifact_root.absolute() / "artifacts").as_uri() if local else None
        return str(client.create_experiment(name, artifact_location=where))

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """A client of our own: MLflow's global active run and URI are never touched."""
        prepare(self.uri)
        with _environment(self.uri), _translated(self.uri):
            from mlflow import MlflowClient

            _require_database(self.uri)
            make_folder(self.artifact_root)
            client = MlflowClient(tracking_uri=self.uri)
            client.search_experiments(max_results=1)
            yield client


def _require_database(uri: str) -> None:
    """Ask SQLite itself first: MLflow would retry an unreadable file for minutes."""
    path = _sqlite_file(uri)
    if path is not None:
        connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=5)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()


def experiment_name(model_name: str) -> str:
    """The experiment of a model: "guardedit/smollm2-135m"."""
    return f"guardedit/{model_name}"


def last_entries(ledger: EntrySource) -> dict[str, int]:
    """The last ledger entry of each plan, in the order in which plans appear."""
    plans: dict[str, str] = {}
    last: dict[str, int] = {}
    for entry in ledger.entries():
        plan, edit = entry.body.get("plan_id"), entry.body.get("edit_id")
        if isinstance(plan, str) and isinstance(edit, str):
            plans[edit] = plan
        plan = plan or plans.get(str(edit))
        if isinstance(plan, str):
            last[plan] = entry.seq
    return last


def _known_seqs(client: MlflowClient) -> dict[str, int]:
    experiments = client.search_experiments(filter_string="name LIKE 'guardedit/%'")
    found: dict[str, int] = {}
    token = None
    while experiments:
        page = client.search_runs(
            [e.experiment_id for e in experiments],
            "tags.`guardedit.stage` = 'plan'",
            max_results=1000,
            page_token=token,
        )
        for run in page:
            found[run.data.tags["guardedit.plan_id"]] = int(run.data.tags.get("guardedit.ledger_seq", -1))
        token = page.token
        if not token:
            break
    return found


def _find(client: MlflowClient, experiment: str, plan_id: str) -> dict[str, Run]:
    """The runs of a plan by stage; the oldest, should there be two."""
    runs = client.search_runs(
        [experiment], f"tags.`guardedit.plan_id` = '{plan_id}'", order_by=["attributes.start_time DESC"]
    )
    return {run.data.tags.get("guardedit.stage", ""): run for run in runs}


def _run(
    client: MlflowClient,
    experiment: str,
    audit: AuditReport,
    stage: content.Stage,
    known: dict[str, Run],
    parent: Run | None = None,
) -> Run:
    if stage in known:
        return known[stage]
    tags = {
        "guardedit.plan_id": audit.plan.plan_id,
        "guardedit.stage": stage,
        "mlflow.user": content.visible(audit.plan.author),
        "mlflow.source.name": "guardedit",
        **({"mlflow.parentRunId": parent.info.run_id} if parent else {}),
    }
    name = content.run_name(audit) if stage == "plan" else stage
    return client.create_run(experiment, content.milliseconds(audit.plan.created), tags, name)


def _is_told(run: Run, marks: dict[str, str]) -> bool:
    return all(run.data.tags.get(name) == value for name, value in marks.items())


def _tags(tags: dict[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in tags.items()]


def _numbers(numbers: dict[str, float], audit: AuditReport) -> list[Any]:
    from mlflow.entities import Metric

    at = content.milliseconds(audit.created)
    return [Metric(name, value, at, 0) for name, value in sorted(numbers.items())]


def _fill(client: MlflowClient, run_id: str, audit: AuditReport, report_dir: Path | None) -> None:
    """The plan's run: description, tags, parameters, every metric, tables, figures, files, inputs."""
    from mlflow.entities import Param

    by_stage = content.metrics(audit)
    tables = content.tables(audit)
    tags = content.tags(audit) | {
        "mlflow.note.content": content.description(audit)[:7900],
        "mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in tables]),
    }
    chosen = [Param(name, value) for name, value in content.params(audit).items()]
    _batched(
        client,
        run_id,
        _numbers({k: v for m in by_stage.values() for k, v in m.items()}, audit),
        chosen,
        _tags(tags),
    )
    for path, rows in tables.items():
        _table(client, run_id, path, rows)
    _inputs(client, run_id, content.datasets(audit))
    client.log_text(run_id, canonical(audit.plan).decode(), "plan.json")
    _files(client, run_id, audit, report_dir)
    for picture in sheet_of(audit).pictures:
        client.log_text(run_id, draw(picture, "light"), f"figures/{picture.name}.svg")


def _batched(
    client: MlflowClient, run_id: str, numbers: list[Any], chosen: list[Any], tags: list[Any]
) -> None:
    """MLflow takes a thousand metrics and a hundred parameters or tags at a time."""
    for start in range(0, max(len(numbers), 1), 900):
        client.log_batch(run_id, metrics=numbers[start : start + 900])
    for start in range(0, max(len(chosen), len(tags)), 90):
        client.log_batch(run_id, params=chosen[start : start + 90], tags=tags[start : start + 90])


def _table(client: MlflowClient, run_id: str, path: str, rows: list[dict[str, Any]]) -> None:
    """MLflow's table format, written whole: its own `log_table` would append on every retelling."""
    columns = list(rows[0])
    client.log_dict(run_id, {"columns": columns, "data": [[row[c] for c in columns] for row in rows]}, path)


def _inputs(client: MlflowClient, run_id: str, datasets: tuple[content.Dataset, ...]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    told = [
        DatasetInput(
            # MLflow keeps 36 characters of a digest; the whole one stands in the source.
            Dataset(
                d.name, d.digest.removeprefix("sha256:")[:12], "guardedit", json.dumps({"digest": d.digest})
            ),
            [InputTag("mlflow.data.context", d.context)],
        )
        for d in datasets
    ]
    if told:
        client.log_inputs(run_id, told)


def _files(client: MlflowClient, run_id: str, audit: AuditReport, report_dir: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = report_dir if report_dir is not None else Path(scratch)
        if report_dir is None:
            render(audit, folder)
        for name in ("report.html", "report.md", "report.json"):
            client.log_artifact(run_id, str(folder / name))


def _fill_stage(client: MlflowClient, run: Run, audit: AuditReport, stage: content.Stage) -> None:
    numbers = content.metrics(audit)[stage]
    tags = {
        "mlflow.note.content": content.stage_description(audit, stage)[:7900],
        "guardedit.outcome": audit.outcome,
    }
    _batched(client, run.info.run_id, _numbers(numbers, audit), [], _tags(tags))
    _close(client, run, "FINISHED", audit)


def _close(client: MlflowClient, run: Run, status: str, audit: AuditReport) -> None:
    name = content.run_name(audit) if run.data.tags.get("guardedit.stage") == "plan" else None
    if status == "FINISHED":
        client.set_terminated(run.info.run_id, status, content.milliseconds(audit.created))
    client.update_run(run.info.run_id, status, name)
