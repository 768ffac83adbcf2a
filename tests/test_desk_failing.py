"""A review queue whose server fails: nothing is lost, and the reason is told."""

from __future__ import annotations

import http.server
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
from pipeline_helpers import SOFT, Home, empty_mlflow, home, mlflow_home, request_of, world

from guardedit.audit.desk import server, traces
from guardedit.audit.desk.page import Terms, page_of
from guardedit.audit.tracking import Tracker
from guardedit.errors import BadRequestError, GuardeditError, TrackingError

__all__ = ["empty_mlflow", "home", "mlflow_home", "world"]


class _Failing(http.server.BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def failing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Failing) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


def test_a_server_that_answers_500_delays_the_view_and_nothing_else(home: Home, failing: str) -> None:
    guard = home.guard(tracking_uri=failing)
    plan_id = guard.plan(request_of()).plan_id
    assert guard.apply(plan_id).outcome == "committed"
    started = time.monotonic()
    assert guard.report(plan_id).mlflow_problem is not None
    with pytest.raises(TrackingError):
        guard.sync()
    with pytest.raises(TrackingError, match="answered 500"):
        server.look(failing)
    assert time.monotonic() - started < 60
    assert guard.verify()["plans"] == 1 and guard.state(plan_id) == "committed"


def test_collecting_from_a_server_that_is_away_records_nothing(home: Home, failing: str) -> None:
    guard = home.guard(SOFT, tracking_uri=failing)
    plan_id = guard.plan(request_of()).plan_id
    before = home.trace()
    ran = home.run("collect", mlflow=failing)
    assert ran.code == 2 and "Nothing was put on record" in ran.err
    assert home.trace() == before and guard.state(plan_id) == "needs-approval"


def test_a_login_wants_a_password_and_a_home_that_is_a_server_is_not_served(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(server.PASSWORD, raising=False)
    with pytest.raises(GuardeditError, match=r"PASSWORD|login"):
        server.environment(home.folder, login=True)
    ran = home.run("serve", mlflow="http://127.0.0.1:9")
    assert ran.code == 2 and "is a server already" in ran.err
    with pytest.raises(BadRequestError, match="has no login"):
        from guardedit.pipeline.serving import give_roles

        give_roles(home.guard(tracking_uri="sqlite:///x.db"), ["ana"], [])


def test_is_shown_is_false_for_a_page_that_was_changed(empty_mlflow: Path, tmp_path: Path) -> None:
    shutil.copyfile(empty_mlflow, tmp_path / "mlflow.db")
    told = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "art")
    audit = builders.eiffel_waiting()
    told.log_audit(audit)
    made = page_of(audit, Terms())
    with told.at_desk(audit.plan.model_name) as (_, desk):
        assert traces.is_shown(desk.tracing, made)
        for change in (page_of(audit, Terms(hours=1)), page_of(audit, Terms(signed=True))):
            assert not traces.is_shown(desk.tracing, change)
