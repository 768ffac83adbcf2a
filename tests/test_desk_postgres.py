"""The desk on Postgres: a throw-away cluster of its own, from the system's package. What SQLite shows, it shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk_helpers import everything_in, free_port, serving
from pipeline_helpers import SOFT, Home, empty_mlflow, home, mlflow_home, request_of, world

from guardedit.audit.desk import server as server_room
from guardedit.audit.desk import traces
from guardedit.audit.mlflow_store import connected
from guardedit.errors import TrackingError
from guardedit.pipeline import telling
from guardedit.pipeline.applying import read_report_facts
from guardedit.pipeline.reporting import tracker
from guardedit.pipeline.serving import prepared

__all__ = ["empty_mlflow", "home", "mlflow_home", "world"]
pytest.importorskip("psycopg", reason="the extra guardedit[postgres] is not installed")
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PROGRAMS, reason="Postgres is not installed (Debian: apt-get install postgresql)"),
]


class Cluster:
    """One server, run by somebody who is not root: Postgres refuses root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user)

    def database(self, name: str) -> str:
        """The address of a new one: two homes of one model want two."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "guardedit", name)
        return f"postgresql://guardedit@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-U", "guardedit", "-A", "trust", "--no-sync", "-E", "UTF8")
        told = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run(
            "pg_ctl", "-D", data, "-l", str(self.folder / "log"), "-o", told, "-t", "120", "-w", "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *words: str) -> None:
        command: Any = [str(PROGRAMS[-1].parent / program), *words]
        # What a server inherits it keeps open: a pipe would never end.
        with (self.folder.parent / f"{self.folder.name}.said").open("wb") as said:
            subprocess.run(command, check=True, user=self.user, cwd="/", stdout=said, stderr=said)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="guardedit-postgres-"))
    made = Cluster(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.said").unlink()


def test_what_sqlite_shows_postgres_shows(mlflow_home: Home, cluster: Cluster) -> None:
    uri = cluster.database("same")
    first = mlflow_home.guard(tracking_uri=uri)
    committed = first.plan(request_of()).plan_id
    first.apply(committed)
    waits = mlflow_home.guard(SOFT, tracking_uri=uri).plan(request_of(1)).plan_id
    told = first.sync()
    assert set(told["told"]) == {committed, waits} and told["notes"] == [] and first.sync()["told"] == {}
    file = f"sqlite:///{mlflow_home.folder / 'mlflow.db'}"
    assert mlflow_home.guard(tracking_uri=file).sync()["behind"] == 0

    root = mlflow_home.folder / "mlflow-artifacts" / "artifacts"
    there, here = everything_in(uri, root), everything_in(file, root)
    assert there["versions"].keys() == {committed} and list(there["queue"].values()) == ["pending"]
    for what in ("runs", "queue", "aliases", "versions", "tags"):
        assert there[what] == here[what], what
    assert there["traces"].keys() == here["traces"].keys()
    for name, trace in there["traces"].items():
        assert trace[2:] == here["traces"][name][2:], (
            "the trace, but for the preview that Postgres keeps short"
        )
    audit = read_report_facts(first, first.read_plan(waits))
    with tracker(first).at_desk(audit.plan.model_name) as (_, desk):
        assert traces.is_shown(desk.tracing, desk.page(audit))
    page = desk.page(audit)
    assert there["traces"][page.trace_id][0] in (page.asked, page.asked_briefly)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of time that a busy machine keeps, too."""
    look = server_room.look
    monkeypatch.setattr(server_room, "look", lambda uri, _=0.0: look(uri, 120.0))
    monkeypatch.setattr(telling, "SECONDS", 600.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")


def test_a_plan_is_in_the_queue_of_a_server_on_postgres_when_it_was_proposed(
    home: Home, cluster: Cluster, tmp_path: Path, patient: None
) -> None:
    uri = cluster.database("served")
    made = prepared(home.guard(SOFT, tracking_uri=uri), 5000, login=False)
    assert uri in made.command and made.notes == ()
    asked = str(home.requests(request_of(2).model_dump(exclude_none=True)))
    with serving(uri, tmp_path / "server") as server:
        named = ("--policy", str(home.policy(SOFT)))
        ran = home.run("--json", "plan", asked, *named, mlflow=server.address)
        plan_id = ran.json["plans"][0]["plan_id"]
        assert ran.code == 4 and "guardedit sync" not in ran.err
        guard = home.guard(SOFT, tracking_uri=server.address)
        audit = read_report_facts(guard, guard.read_plan(plan_id))
        with tracker(guard).at_desk(audit.plan.model_name) as (_, desk):
            assert desk.queue.items("pending").keys() >= {desk.page(audit).trace_id}
        assert guard.sync()["told"] == {}
        said = home.run("reject", plan_id, "--reason", "not this one", mlflow=server.address)
        assert said.code == 0 and "guardedit sync" not in said.err
        with tracker(guard).at_desk(audit.plan.model_name) as (_, desk):
            assert desk.page(audit).trace_id not in desk.queue.items("pending")


def test_a_postgres_that_is_down_is_said_without_its_password(home: Home) -> None:
    guard = home.guard(tracking_uri=f"postgresql://desk:secret@127.0.0.1:{free_port()}/postgres")
    guard.plan(request_of())
    with pytest.raises(TrackingError) as caught, connected(str(guard.settings.tracking_uri)):
        pass
    assert "secret" not in str(caught.value)
