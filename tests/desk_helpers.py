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

from guardedit.audit.desk import server
from guardedit.audit.desk.page import QUESTION

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
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(server.PASSWORD, ADMIN)
        environment = server.environment(folder, login)
    words = server.command(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts", port, login)
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


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
