"""A server that was named is told at once; one that is down, slow or broken delays the view and nothing else."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pipeline_helpers import CLOSED_PORT, SOFT, Home, empty_mlflow, home, mlflow_home, request_of, world

from guardedit.audit.mlflow_store import connected
from guardedit.errors import TrackingError
from guardedit.pipeline import patience, reporting, telling
from guardedit.pipeline.telling import tell_server

__all__ = ["empty_mlflow", "home", "mlflow_home", "world"]


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers each question with the server's `status`, after its `seconds`; the first at once."""

    def do_GET(self) -> None:
        if self.server.asked:  # type: ignore[attr-defined]
            time.sleep(self.server.seconds)  # type: ignore[attr-defined]
        self.server.asked += 1  # type: ignore[attr-defined]
        body = json.dumps({"experiments": []}).encode()
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    status, seconds = request.param
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as made:
        made.status, made.seconds, made.asked = status, seconds, 0  # type: ignore[attr-defined]
        made.daemon_threads, made.handle_error = True, lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen()
        yield f"http://127.0.0.1:{made.getsockname()[1]}"


def planned(home: Home, mlflow: str) -> tuple[Any, float]:
    asked = str(home.requests(request_of().model_dump(exclude_none=True)))
    started = time.monotonic()
    ran = home.run("--json", "plan", asked, "--policy", str(home.policy(SOFT)), mlflow=mlflow)
    return ran, time.monotonic() - started


def looked_after(home: Home, ran: Any) -> None:
    """The plan is on record as ever, and one line says what is late."""
    (plan,) = ran.json["plans"]
    assert ran.code == 4 and home.guard().state(plan["plan_id"]) == "needs-approval"
    assert [entry.kind for entry in home.guard().ledger.entries()] == ["planned"]
    (line,) = [line for line in ran.err.splitlines() if "guardedit sync" in line]
    assert line.startswith("MLflow does not show this yet; `guardedit sync` catches up.")


def test_a_server_that_is_down_delays_the_view_of_a_plan_and_of_a_word(home: Home) -> None:
    ran, _ = planned(home, CLOSED_PORT)
    looked_after(home, ran)
    plan_id = ran.json["plans"][0]["plan_id"]
    said = home.run("approve", plan_id, "--reason", "read it")
    assert said.code == 0 and "catches up" in said.err and home.guard().state(plan_id) == "approved"


@pytest.mark.parametrize("server", [(500, 0)], indirect=True)
def test_a_server_that_answers_500_delays_the_view_of_a_plan(home: Home, server: str) -> None:
    ran, _ = planned(home, server)
    looked_after(home, ran)
    assert "answered 500" in ran.err


def test_a_server_that_says_nothing_costs_a_plan_its_glance(
    home: Home, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "GLANCE_SECONDS", 0.3)
    looked_after(home, planned(home, silent)[0])


@pytest.mark.parametrize("server", [(200, 30)], indirect=True)
def test_a_server_that_becomes_slow_is_not_waited_for(home: Home, server: str) -> None:
    guard = home.guard(SOFT, tracking_uri=server)
    plan_id = guard.plan(request_of()).plan_id
    started = time.monotonic()
    assert tell_server(guard, [plan_id], seconds=1.0) == "MLflow did not finish within 1 s"
    assert time.monotonic() - started < 10
    assert guard.state(plan_id) == "needs-approval" and len(guard.ledger.entries()) == 1


@pytest.mark.parametrize("server", [(200, 30)], indirect=True)
def test_a_slow_server_does_not_hold_up_the_report_of_an_edit(
    home: Home, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "SECONDS", 1.0)
    guard = home.guard(tracking_uri=server)
    plan_id = guard.plan(request_of()).plan_id
    assert guard.apply(plan_id).outcome == "committed"
    assert "did not finish within 1 s" in str(guard.report(plan_id).mlflow_problem)
    assert guard.ledger.entries()[-1].kind == "untracked" and guard.verify()["plans"] == 1


def test_what_goes_wrong_within_the_time_is_raised_as_it_is() -> None:
    assert patience.within(5, lambda: "told") == "told"
    with pytest.raises(TimeoutError, match="a disk"):
        patience.within(5, lambda: (_ for _ in ()).throw(TimeoutError("a disk")))
    with pytest.raises(TrackingError, match="within 0"):
        patience.within(0.05, lambda: time.sleep(1))


def test_a_file_in_the_home_is_not_told_at_once_and_costs_nothing(home: Home) -> None:
    guard = home.guard(SOFT, tracking_uri=None)
    plan_id = guard.plan(request_of()).plan_id
    assert tell_server(guard, [plan_id]) is None and not (home.folder / "mlflow.db").exists()
    quick = (
        "import sys, guardedit.pipeline.telling; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", quick], check=False).returncode == 0


def test_what_was_told_at_once_is_all_that_sync_would_tell(mlflow_home: Home) -> None:
    guard = mlflow_home.guard(SOFT, tracking_uri=f"sqlite:///{mlflow_home.folder / 'mlflow.db'}")
    plan_id = guard.plan(request_of()).plan_id
    assert reporting.tell(guard, [plan_id]) == () and not (guard.settings.reports / plan_id).exists()
    with connected(reporting.tracking_uri(guard)) as client:
        (experiment,) = client.search_experiments(filter_string="name LIKE 'guardedit/%'")
        shown = client.search_runs([experiment.experiment_id], "tags.`guardedit.waits` = 'yes'")
    assert [run.data.tags["guardedit.plan_id"] for run in shown] == [plan_id]
    with reporting.tracker(guard).at_desk(guard.read_plan(plan_id).model_name) as (_, desk):
        assert len(desk.queue.items("pending")) == 1
    assert guard.sync()["told"] == {}
