"""The reviewers' desk without a server: pages, the queue, saved views, registered versions, and answers that count."""

from __future__ import annotations

import base64
import json
import shutil
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import builders
import pytest
from audit_helpers import EVIL
from builder_parts import digest
from desk_helpers import everything_in
from pipeline_helpers import SOFT, Home, empty_mlflow, home, mlflow_home, request_of, world

from guardedit.audit.desk import models, page, views
from guardedit.audit.desk.page import Terms, page_of
from guardedit.audit.desk.reviews import Answer
from guardedit.audit.mlflow_store import connected
from guardedit.audit.tracking import Tracker
from guardedit.errors import NeedsApprovalError, StaleError
from guardedit.pipeline.desk import chosen, collect
from guardedit.pipeline.reporting import tracker
from guardedit.pipeline.served import Served
from guardedit.records import AuditReport

__all__ = ["empty_mlflow", "home", "mlflow_home", "world"]
DONE = datetime(2026, 11, 1, 9, tzinfo=UTC)


def saying(approves: bool, source: str = "ana", after: float = -1.0) -> Answer:
    """An answer, so many seconds after the item was completed."""
    return Answer(approves, "read it", source, DONE + timedelta(seconds=after))


# -- the page


def test_a_page_says_everything_that_a_decision_needs() -> None:
    audit = builders.eiffel_waiting()
    made = page_of(audit, Terms(hours=5, approvals=2, signed=True))
    text = made.asked + made.found
    for part in (audit.plan_digest, audit.plan.policy_digest, "“Rome”", "5 hours", "--key NAME", "2 different people",
                 "Approve:", "Reject:", "under Rationale"):  # fmt: skip
        assert part in text, part
    rows = [line for line in made.found.splitlines() if line.startswith("| ") and " at most " in line]
    assert len(rows) == len(audit.plan.judgement.findings)


def test_a_page_hides_no_character_and_names_those_beyond_ascii() -> None:
    audit = builders.eiffel_waiting()
    request = EVIL.model_copy(update={"target_new": "Kraków"})
    audit = audit.model_copy(update={"plan": audit.plan.model_copy(update={"requests": (request,)})})
    made = page_of(audit, Terms())
    text = made.asked + made.found
    assert "\u202e" not in text and "\u200b" not in text and "U+202E" in text and "ó U+00F3" in text
    assert "<script>" not in text and r"\<script\>" in text


def test_a_page_depends_on_what_an_approval_names_and_on_nothing_else() -> None:
    audit = builders.eiffel_waiting()
    made = page_of(audit, Terms())
    decided = builders.eiffel_committed().decision
    for later in (
        {"decision": decided},
        {"outcome": "rejected"},
        {"mlflow_run_id": "x"},
        {"created": audit.plan.created},
    ):
        assert page_of(audit.model_copy(update=later), Terms()) == made
    other = audit.model_copy(update={"plan_digest": digest("another plan")})
    assert page_of(other, Terms()).trace_id != made.trace_id


def test_a_held_edit_is_a_question_of_its_own() -> None:
    live = builders.eiffel_committed()
    assert live.postop is not None
    held = live.model_copy(
        update={"outcome": "held", "postop": live.postop.model_copy(update={"outcome": "held"})}
    )
    before, after = page_of(live, Terms()), page_of(held, Terms())
    assert before.trace_id != after.trace_id and "Limits on the staged copy" in after.found
    assert "Limits on the staged copy" not in before.found


@pytest.mark.parametrize("audit", builders.everything(), ids=lambda a: a.edit_id)
def test_a_brief_page_fits_and_cuts_nothing_short(audit: AuditReport) -> None:
    made = page_of(audit, Terms())
    assert max(len(made.asked_briefly), len(made.found_briefly)) <= page.BRIEF
    assert audit.plan_digest in made.asked_briefly + made.found_briefly or made.found_briefly == made.found
    request = audit.plan.requests[0].model_copy(update={"subject": "so " * 900 + "harmless"})
    long = audit.model_copy(update={"plan": audit.plan.model_copy(update={"requests": (request,)})})
    brief = page_of(long, Terms())
    assert len(brief.asked_briefly) <= page.BRIEF and "View full trace" in brief.asked_briefly


# -- which answers count


def test_the_completers_plain_answer_counts() -> None:
    assert chosen([saying(True), saying(False, "eva")], "ana", DONE) == saying(True)
    assert chosen([saying(False)], "ANA", DONE) == saying(False)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([], "no answer stands under that name"),
        ([saying(True, "eva")], "no answer stands under that name"),
        ([saying(False), saying(True)], "contradict"),
        ([saying(True, after=60)], "after the item was completed"),
    ],
)
def test_an_answer_that_is_not_plainly_the_completers_counts_for_nothing(
    answers: list[Answer], why: str
) -> None:
    with pytest.raises(NeedsApprovalError, match=why):
        chosen(answers, "ana", DONE)


def test_without_a_login_no_answer_counts_and_command_and_page_say_so(mlflow_home: Home) -> None:
    uri = f"sqlite:///{mlflow_home.folder / 'mlflow.db'}"
    guard = mlflow_home.guard(SOFT, tracking_uri=uri)
    plan = guard.plan(request_of())
    guard.sync()
    with tracker(guard).at_desk(plan.model_name) as (experiment, desk):
        (trace,) = desk.queue.items("pending")
        client = desk.tracing
        schema = client._get_label_schema_by_name(experiment, page.QUESTION)
        assert "DOES NOT COUNT" in schema.instruction
        client._set_review_queue_item_status(
            desk.queue.queue_id, item_id=trace, status="complete", completed_by="ana"
        )
    (one,) = collect(guard).answers
    assert one.outcome == "refused" and "no login" in one.reason
    ran = mlflow_home.run("collect", mlflow=uri)
    assert ran.code == 4 and "do NOT count" in ran.out and guard.state(plan.plan_id) == "needs-approval"


# -- saved views, versions, telling twice


def test_sync_tells_the_whole_desk_and_telling_it_again_changes_nothing(
    mlflow_home: Home, empty_mlflow: Path
) -> None:
    uri = f"sqlite:///{mlflow_home.folder / 'mlflow.db'}"
    guard = mlflow_home.guard(tracking_uri=uri)
    first, second = guard.plan(request_of()).plan_id, guard.plan(request_of(1)).plan_id
    guard.apply(first)
    guard.sync()
    with connected(uri) as client:
        name = models.registered_name(guard.read_plan(first).model_name)
        aliases = client.get_registered_model(name).aliases
        assert {alias: str(version) for alias, version in aliases.items()} == {"production": "1"}
    asks = mlflow_home.guard(SOFT, tracking_uri=uri)
    waits = asks.plan(request_of(2)).plan_id
    guard.sync()
    root = mlflow_home.folder / "mlflow-artifacts" / "artifacts"
    before = everything_in(uri, root)
    assert set(before["versions"]) == {first} and list(before["queue"].values()) == ["pending"]
    assert len(before["traces"]) == 3 and {first, second, waits} == {
        tags[2]["guardedit.plan_id"] for tags in before["traces"].values()
    }
    assert guard.sync()["told"] == {}
    with connected(uri) as client:  # even where every mark is gone, telling it anew adds nothing
        for experiment in client.search_experiments(filter_string="name LIKE 'guardedit/%'"):
            for run in client.search_runs([experiment.experiment_id], "tags.`guardedit.stage` = 'plan'"):
                client.delete_tag(run.info.run_id, "guardedit.record")
                client.delete_tag(run.info.run_id, "guardedit.view")
    assert set(guard.sync()["told"]) == {first, second, waits}
    assert everything_in(uri, root) == before
    # and a database that was lost comes back with the same content
    shutil.copyfile(empty_mlflow, mlflow_home.folder / "mlflow.db.new")
    again = mlflow_home.guard(tracking_uri=f"sqlite:///{mlflow_home.folder / 'mlflow.db.new'}")
    again.sync()
    rebuilt = everything_in(f"sqlite:///{mlflow_home.folder / 'mlflow.db.new'}", root)
    assert {k: v for k, v in rebuilt.items() if k != "files"} == {
        k: v for k, v in before.items() if k != "files"
    }


def test_production_is_the_ledgers_head_and_an_undone_edit_gives_it_back(mlflow_home: Home) -> None:
    uri = f"sqlite:///{mlflow_home.folder / 'mlflow.db'}"
    guard = mlflow_home.guard(tracking_uri=uri)
    first = guard.plan(request_of()).plan_id
    guard.apply(first)
    second = guard.plan(request_of(1)).plan_id
    guard.apply(second)
    guard.sync()

    def aliases() -> dict[str, str]:
        with connected(uri) as client:
            shelf = models.read(client, guard.read_plan(first).model_name)
        plans = {number: plan for plan, number in shelf.versions.items()}
        return {alias: plans[number] for alias, number in shelf.aliases.items()}

    assert aliases() == {"production": second, "previous": first}
    guard.rollback(second)
    guard.sync()
    assert aliases() == {"production": first}
    guard.rollback(first)
    guard.sync()
    assert aliases() == {}


def test_a_version_holds_the_delta_loads_without_pickle_and_refuses_another_base(
    mlflow_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{mlflow_home.folder / 'mlflow.db'}"
    guard = mlflow_home.guard(tracking_uri=uri)
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    guard.sync()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow.pyfunc

    with connected(uri) as client:
        shelf = models.read(client, plan.model_name)
        source = client.get_model_version(shelf.name, "1").source.removeprefix("file://")
    kept = {p.name for p in Path(source).rglob("*") if p.is_file()}
    assert "delta.safetensors" in kept and not {n for n in kept if n.endswith((".pkl", ".pickle", ".bin"))}
    assert str(mlflow_home.world.model.parent) not in (Path(source) / "MLmodel").read_text()
    loaded = mlflow.pyfunc.load_model(
        source, model_config={"base": str(mlflow_home.world.model), "tokens": 4}
    )
    (said,) = loaded.predict([plan.requests[0].filled])
    folder = guard.plan_folder(plan.plan_id)
    here = Served(folder / "plan.json", folder / "delta.safetensors", str(mlflow_home.world.model))
    assert said == here.answer(plan.requests[0].filled, 4)
    guard.export(tmp_path / "edited")
    with pytest.raises(StaleError, match="name the right base"):
        Served(folder / "plan.json", folder / "delta.safetensors", str(tmp_path / "edited"))


@pytest.mark.parametrize("key", views.VIEWS)
def test_a_saved_view_unpacks_to_a_filter_that_mlflow_understands(
    key: str, empty_mlflow: Path, tmp_path: Path
) -> None:
    shutil.copyfile(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    told = Tracker(uri, tmp_path / "art")
    told.log_audit(builders.eiffel_waiting())
    told.log_audit(builders.france_blocked())
    with connected(uri) as client:
        (experiment,) = client.search_experiments(filter_string="name LIKE 'guardedit/%'")
        tag = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
        state = json.loads(zlib.decompress(base64.b64decode(tag["state"].removeprefix("deflate;"))))
        runs = client.search_runs([experiment.experiment_id], state["searchFilter"])
        outcomes = sorted(run.data.tags["guardedit.outcome"] for run in runs)
        assert len(experiment.tags[f"mlflow.sharedViewState.{key}"]) < 20_000
    expected = {
        "Pending": ["needs-approval"],
        "Risk × drift": ["blocked", "needs-approval"],
        "Incidents": ["blocked"],
    }
    assert outcomes == expected[tag["name"]]
