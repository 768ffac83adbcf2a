"""A webhook on the desk's server says that an edit was committed, signed, and says no more than that."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from desk_helpers import running
from pipeline_helpers import Home, empty_mlflow, home, request_of, world

__all__ = ["empty_mlflow", "home", "world"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Listener(HTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hook)
        self.heard: list[tuple[dict[str, str], bytes]] = []


class Hook(BaseHTTPRequestHandler):
    """Says yes to everything."""

    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.heard.append(({k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_commit_is_told_to_whoever_registered_a_webhook(
    home: Home, empty_mlflow: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hook on this machine, without TLS, is what MLflow refuses elsewhere.
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    with running(tmp_path / "server", empty_mlflow, login=False) as server:
        from mlflow import MlflowClient

        client = MlflowClient(server.address)
        url = f"http://127.0.0.1:{listener.server_port}/hook"
        client.create_webhook(
            name="edits", url=url, events=["model_version_alias.created"], secret="a-shared-secret"
        )
        guard = home.guard()
        guard.apply(guard.plan(request_of()).plan_id)
        assert listener.heard == [], "nothing is told before the server knows of it"
        home.guard(tracking_uri=server.address).sync()
        for _ in range(120):
            if listener.heard:
                break
            time.sleep(0.5)
    headers, body = listener.heard[0]
    told = json.loads(body)
    assert told["data"]["alias"] == "production" and told["data"]["version"] == "1"
    assert headers["x-mlflow-signature"].startswith("v1,")
    assert told["data"].keys() == {"name", "alias", "version"}, "the payload names nobody"
