"""MLflow's store: opened quietly, quickly given up on, created once. Nothing about edits here."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from filelock import FileLock

from guardedit.audit.files import make_folder, publish_file
from guardedit.errors import StorageError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SECONDS = 60.0
_REFUSALS = (sqlite3.Error, OSError, StorageError)
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_HTTP = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""MLflow's own are 7 retries and 120 s: four minutes of waiting for a server that is down."""


@contextmanager
def connected(uri: str) -> Iterator[MlflowClient]:
    """A client of our own: MLflow's global active run and URI are never touched.

    Raises TrackingError within seconds when MLflow is away, also for what goes wrong inside the block.
    """
    prepare(uri)
    with _environment(uri), _translated(uri):
        from mlflow import MlflowClient

        _require_database(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        yield client


@contextmanager
def _environment(uri: str) -> Iterator[None]:
    """MLflow's switches while it is used, as they were afterwards. Retries that the user set stay; telemetry is off."""
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
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"MLflow's database needs {error.name}; for Postgres: pip install 'guardedit[postgres]'"
        ) from error
    except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, *_REFUSALS) as error:
        login = urlparse(uri).netloc.rpartition("@")[0]
        said = str(error).replace(f"{login}@", "") if login else str(error)
        first = (said.splitlines() or [type(error).__name__])[0][:300]
        advice = "run `guardedit sync` when it is back"
        raise TrackingError(f"MLflow at {_public(uri)} did not answer: {first}; {advice}") from error


def _public(uri: str) -> str:
    """The URI without user name and password."""
    parts = urlparse(uri)
    return uri.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2]) if "@" in parts.netloc else uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, or None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def prepare(uri: str) -> None:
    """Create MLflow's SQLite database if it is missing: 6 to 10 s, safe beside other processes, a crash leaves nothing.

    Nothing to do for a server, or when the file is there. Raises TrackingError.
    """
    path = sqlite_file(uri)
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
        # Nobody needs the half-made file after a crash, so SQLite need not wait for the disk a hundred times.
        sqlalchemy.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF"))
        try:
            # MLflow runs its migrations on first use only from inside its store; this is the same call.
            database._initialize_tables(engine)
        finally:
            engine.dispose()
        _sync_file(fresh)
        publish_file(fresh, path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


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


def _require_database(uri: str) -> None:
    """Ask SQLite itself first: MLflow would retry an unreadable file for minutes."""
    path = sqlite_file(uri)
    if path is not None:
        connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=5)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
