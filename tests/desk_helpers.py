"""A real MLflow server on this machine, with or without a login, and people who use it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from guardedit.audit.desk import reviews, server
from guardedit.audit.desk.page import QUESTION
from guardedit.audit.mlflow_store import connected

ADMIN = "a-long-enough-password"
PEOPLE = ("ana", "eva", "ben", "run", "desk")
WORD = "correct-horse-battery"


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    address: str
    folder: Path

    def as_(self, name: str) -> str:
        """The address with a user's credentials in it."""
        word = ADMIN if name == "admin" else WORD
        return self.address.replace("http://", f"http://{name}:{word}@")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path, empty: Path, login: bool) -> Iterator[Running]:
    """Start a server on a copy of an empty database as `guardedit serve` does, and stop it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(empty, folder / "mlflow.db")
    with serving(f"sqlite:///{folder / 'mlflow.db'}", folder, login) as made:
        yield made


@contextlib.contextmanager
def serving(uri: str, folder: Path, login: bool = False) -> Iterator[Running]:
    """Start a server on a database as `guardedit serve` does, and stop it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(server.PASSWORD, ADMIN)
        environment = server.environment(folder, login)
    words = server.command(uri, folder / "artifacts", port, login)
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(
        words, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
    )
    try:
        made = Running(f"http://127.0.0.1:{port}", folder)
        _wait(process, made, folder / "server.log")
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        log.close()


def _wait(process: Any, made: Running, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"MLflow ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{made.address}/health", timeout=1).ok:
                return
        time.sleep(0.5)
    raise RuntimeError(f"MLflow did not start: {log.read_text()[-2000:]}")


def add_people(made: Running) -> None:
    """Users without any right."""
    from mlflow.server import get_app_client

    client = get_app_client("basic-auth", tracking_uri=made.as_("admin"))
    for name in PEOPLE:
        client.create_user(name, WORD)


def call(made: Running, name: str | None, method: str, path: str, body: dict[str, Any]) -> requests.Response:
    """One request as a user, past every client."""
    auth = (name, ADMIN if name == "admin" else WORD) if name else None
    where = f"{made.address}/api/{path}"
    return requests.request(method, where, json=body, auth=auth, timeout=20)


def answer(made: Running, name: str | None, trace_id: str, approves: bool, reason: str, source: str) -> int:
    """Write an answer under a question, with whatever name its writer claims; the server's status code."""
    said: dict[str, Any] = {
        "assessment_name": QUESTION, "trace_id": trace_id, "rationale": reason,
        "source": {"source_type": "HUMAN", "source_id": source}, "feedback": {"value": approves},
        "create_time": _now(), "last_update_time": _now(),
    }  # fmt: skip
    path = f"3.0/mlflow/traces/{trace_id}/assessments"
    return call(made, name, "POST", path, {"assessment": said}).status_code


def complete(made: Running, name: str | None, queue: str, trace_id: str, claimed: str) -> int:
    """Complete an item, with whatever name its writer claims; the server's status code."""
    body = {"queue_id": queue, "item_id": trace_id, "status": "COMPLETE", "completed_by": claimed}
    return call(made, name, "POST", "3.0/mlflow/review-queues/items/set-status", body).status_code


def everything_in(uri: str, root: Path) -> dict[str, Any]:
    """What MLflow holds, without the names and times that it draws itself."""
    with connected(uri) as client:
        from mlflow.tracing.client import TracingClient

        tracing = TracingClient(uri)
        found: dict[str, Any] = {}
        for experiment in client.search_experiments(filter_string="name LIKE 'guardedit/%'"):
            runs = client.search_runs([experiment.experiment_id], max_results=1000)
            names = {
                r.info.run_id: f"{r.data.tags['guardedit.plan_id']}/{r.data.tags['guardedit.stage']}"
                for r in runs
            }
            assert len(set(names.values())) == len(names)
            found["tags"] = dict(experiment.tags)
            found["runs"] = {
                names[r.info.run_id]: (dict(r.data.metrics), dict(r.data.params), r.info.status) for r in runs
            }
            where = [experiment.experiment_id]
            found["traces"] = {
                t.info.trace_id: (t.info.request_preview, t.info.response_preview, dict(t.info.tags)
                                  | {"mlflow.artifactLocation": ""}, t.data.spans[0].inputs,
                                  names[t.info.trace_metadata["mlflow.sourceRun"]], t.info.request_time)
                for t in tracing.search_traces(where)
            }  # fmt: skip
            queue = reviews.Queue(tracing, experiment.experiment_id)
            found["queue"] = {trace: item.status for trace, item in queue.items().items()}
        for shelf in client.search_registered_models():
            found["aliases"] = dict(shelf.aliases)
        found["versions"] = {
            v.tags["guardedit.plan_id"]: (str(v.version), dict(v.tags), names[v.run_id])
            for v in client.search_model_versions("")
        }
        found["files"] = sorted(
            (names.get(p.parents[-len(root.parts) - 2].name, ""), p.name, p.read_bytes())
            for p in root.rglob("*") if p.is_file() and p.suffix in (".yaml", ".safetensors", ".py", ".svg")
        )  # fmt: skip
        return found


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
