"""The whole way through MLflow's own pages, in Chromium: a plan appears in the Review tab, a person approves it there,
`apply` accepts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk_helpers import WORD, Running, add_people, running
from pipeline_helpers import HARD, SOFT, Home, empty_mlflow, home, request_of, world

from guardedit.audit.desk import reviews, views
from guardedit.pipeline.desk import collect
from guardedit.pipeline.reporting import tracker
from guardedit.pipeline.serving import give_roles

__all__ = ["empty_mlflow", "home", "world"]
pytest.importorskip("flask_wtf", reason="the extra guardedit[login] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = (
    os.environ.get("GUARDEDIT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not there; $GUARDEDIT_CHROMIUM names it"),
]
SHOTS = os.environ.get("GUARDEDIT_SCREENSHOTS")
"""A folder to leave pictures in, or nothing."""
REASON = "read every limit; the neighbours keep their answers"
PATIENCE = 120_000
"""Milliseconds: MLflow's pages are big, and the machine may be busy."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("browser"), empty_mlflow, login=True) as made:
        add_people(made)
        yield made


@pytest.fixture
def browse(server: Running) -> Iterator[Any]:
    """A browser page in which ana is logged in."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        login = {"username": "ana", "password": WORD}
        page = browser.new_page(viewport={"width": 1280, "height": 900}, http_credentials=login)
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def picture(page: Any, name: str) -> None:
    """Keep what is on the screen, where a folder was named."""
    close = page.get_by_role("button", name="Close")
    if close.count():
        close.first.click()
    page.wait_for_timeout(2500)
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def test_a_plan_is_approved_in_the_review_tab_and_applied(
    home: Home, server: Running, browse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardedit.pipeline.history.current_user", lambda: "ben")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-enough-password")
    guard = home.guard(SOFT, tracking_uri=server.address)
    plan = guard.plan(request_of())
    assert guard.sync()["notes"] == []
    give_roles(guard, ["ana"], ["run"])
    with tracker(guard).at_desk(plan.model_name) as (experiment, desk):
        queue = reviews.address(server.address, experiment, desk.queue)
        run_id = desk.client.search_runs([experiment], "tags.`guardedit.stage` = 'plan'")[0].info.run_id

    browse.goto(queue)
    browse.get_by_text("Start review").wait_for()
    picture(browse, "desk-queue")
    browse.get_by_text("Start review").click()
    browse.get_by_text("What happens if you decide").wait_for()
    browse.locator("textarea:not([disabled])").wait_for()
    picture(browse, "desk-review")
    assert plan.digest in browse.content() and "Limits before the write" in browse.content()
    browse.get_by_text("Approve", exact=True).click()
    browse.locator("textarea").fill(REASON)
    browse.get_by_role("button", name="Submit").click()
    browse.get_by_text("Completed (1)").wait_for()

    (one,) = collect(guard).answers
    assert (one.by, one.outcome, one.reason) == ("ana", "approved", REASON)
    assert guard.apply(plan.plan_id).outcome == "committed"
    blocked = home.guard(HARD, tracking_uri=server.address).plan(request_of(1))
    waiting = home.guard(SOFT, tracking_uri=server.address).plan(request_of(2))
    assert guard.sync()["notes"] == []

    browse.goto(f"{server.address}/#/experiments/{experiment}/runs/{run_id}")
    browse.get_by_text("Committed:").first.wait_for()
    picture(browse, "desk-run")
    browse.goto(f"{server.address}/#/experiments/{experiment}/runs/{run_id}/artifacts/report.html")
    browse.frame_locator("iframe").get_by_text("What was decided, and why").wait_for()
    picture(browse, "desk-report")
    listed = {"guardedit-pending": waiting, "guardedit-incidents": blocked}
    for key, (name, _, _) in views.VIEWS.items():
        browse.goto(views.address(server.address, experiment, key))
        browse.reload()  # an address that differs behind the # alone leaves the last view's menu open
        browse.get_by_test_id("saved-views-trigger").wait_for()
        if key in listed:
            subject = listed[key].requests[0].subject
            browse.get_by_text(subject).first.wait_for()
            assert not browse.get_by_text(plan.requests[0].subject).count()
        picture(browse, f"desk-{key.removeprefix('guardedit-')}")
        browse.get_by_test_id("saved-views-trigger").click()
        browse.get_by_text(name, exact=True).first.wait_for()
        browse.keyboard.press("Escape")
