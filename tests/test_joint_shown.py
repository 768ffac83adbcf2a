"""A plan of many requests as people see it: on the command line, in the report and in MLflow."""

from __future__ import annotations

import json
from pathlib import Path

from joint_helpers import THREE, key_policy, others, split
from pipeline_helpers import Home, empty_mlflow, home, mlflow_home, world

from guardedit.audit.mlflow_content import metrics, tables

__all__ = ["empty_mlflow", "home", "mlflow_home", "split", "world"]


def test_report_and_mlflow_have_a_row_for_each_request(home: Home, split: tuple[float, int]) -> None:
    limit, place = split
    guard = home.guard(policy=key_policy(home, limit))
    plan = guard.plan(THREE, editor="finetune")
    before = guard.report(plan.plan_id)
    guard.apply(plan.plan_id)
    after = guard.report(plan.plan_id)
    for published in (before, after):
        text = published.files.md.read_text(encoding="utf-8")
        for request in THREE:
            assert text.count(f"{request.filled} …") >= 1, request
        assert (
            "left out by the policy" in text and plan.screened[place].reason.rstrip(".").split(";")[0] in text
        )
    rows = tables(after.audit)["tables/requests.json"]
    assert [row["state"] for row in rows] == ["planned", "planned", "stopped"]
    assert [row["subject"] for row in rows] == [one.subject for one in (*others(place), THREE[place])]
    assert all("holds" in row for row in rows[:2]) and "leaks" in rows[2]["screening"]
    edit = metrics(after.audit)["edit"]
    assert (edit["edit/requests"], edit["edit/stopped"]) == (2.0, 1.0)
    assert edit["edit/requests_held"] == sum(row.holds for row in after.audit.outcomes)


def test_one_run_in_mlflow_for_a_joint_plan(mlflow_home: Home) -> None:
    uri = f"sqlite:///{mlflow_home.folder / 'mlflow.db'}"
    guard = mlflow_home.guard(tracking_uri=uri)
    plan = guard.plan(THREE, editor="finetune")
    published = guard.report(plan.plan_id)
    import mlflow

    client = mlflow.MlflowClient(uri)
    run = client.get_run(published.mlflow_run_id)
    assert run.data.tags["guardedit.plan_id"] == plan.plan_id and run.data.params["requests"] == "3"
    logged = json.loads(Path(client.download_artifacts(run.info.run_id, "tables/requests.json")).read_text())
    assert len(logged["data"]) == 3


# -- the command line


def test_the_command_makes_one_joint_plan_or_one_for_each(home: Home) -> None:
    path = home.requests(*[request.model_dump(exclude_defaults=True) for request in THREE])
    joint = home.run("plan", str(path), "--editor", "finetune", "--json")
    (document,) = joint.json["plans"]
    assert joint.code == 0 and len(document["requests"]) == 3 and document["stopped"] == []
    assert [row["subject"] for row in document["screened"]] == [request.subject for request in THREE]
    each = home.run("plan", str(path), "--editor", "finetune", "--each", "--json")
    assert [len(one["requests"]) for one in each.json["plans"]] == [1, 1, 1]
    single = home.run("plan", str(path), "--json")
    assert len(single.json["plans"]) == 3
    assert not {"stopped", "screened"} & {
        key for one in (*each.json["plans"], *single.json["plans"]) for key in one
    }
    applied = home.run("apply", document["plan_id"])
    assert applied.code == 0 and "of 3 hold" in applied.out and "mean of 3" in applied.out
    shown = home.run("show", document["plan_id"])
    assert all(request.filled in shown.out for request in THREE)


def test_the_command_says_what_is_stopped_and_ends_blocked_where_all_are(
    home: Home, split: tuple[float, int]
) -> None:
    limit, place = split
    path = home.requests(*[request.model_dump(exclude_defaults=True) for request in THREE])
    front = ("plan", str(path), "--editor", "finetune")
    some = home.run(*front, "--policy", str(key_policy(home, limit)))
    assert some.code == 0 and f"STOPPED {THREE[place].filled}" in some.out
    document = home.run(*front, "--policy", str(key_policy(home, 0.0)), "--json")
    assert document.code == 3 and document.json["plans"][0]["outcome"] == "blocked"
    stopped = document.json["plans"][0]["stopped"]
    assert [one["subject"] for one in stopped] == [request.subject for request in THREE]
    assert all("leaks" in one["stopped_because"] for one in stopped)
    none = home.run(*front, "--policy", str(key_policy(home, 0.0)))
    assert none.code == 3 and "nothing was solved" in none.out


def test_a_broken_line_is_named_and_nothing_is_written(home: Home) -> None:
    rows = [json.dumps(request.model_dump(exclude_defaults=True)) for request in THREE]
    path = home.requests(
        "\n".join([rows[0], rows[1], rows[2].replace("target_new", "target_neu")]), name="a.jsonl"
    )
    ran = home.run("plan", str(path), "--editor", "finetune")
    assert ran.code == 2 and "line 3" in ran.err and "target_neu" in ran.err
    assert not home.folder.exists()
