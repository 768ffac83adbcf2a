"""The commands as a person or a program runs them: what they print, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pipeline_helpers as kit
import pytest
from pipeline_helpers import HARD, HARMFUL, SOFT, UNDECIDED, Home, Ran, home, request_of, run, world

from guardedit.audit.versions import VersionStore
from guardedit.models import sources
from guardedit.pipeline import planning

__all__ = ["home", "world"]


def asked(home: Home, *numbers: int) -> str:
    """A requests file."""
    return str(home.requests(*(request_of(n).model_dump(exclude_none=True) for n in numbers or (0,))))


def planned(home: Home, limits: Any = None, number: int = 0) -> tuple[str, list[str]]:
    """A plan's name, and the options that name its policy."""
    policy = ["--policy", str(home.policy(limits))] if limits else []
    ran = home.run("--json", "plan", asked(home, number), *policy)
    assert ran.code in (0, 3, 4), ran.err
    plan_id: str = ran.json["plans"][0]["plan_id"]
    return plan_id, policy


def reports(home: Home) -> list[str]:
    return ["--reports", str(home.folder.parent / "reports")]


def test_the_way_of_an_edit_by_its_commands(home: Home, tmp_path: Path) -> None:
    plan_id, _ = planned(home)
    shown = home.run("show", plan_id)
    assert shown.code == 0 and plan_id in shown.out and "AUTO-APPROVED" in shown.out
    tried = home.run("--json", "try", plan_id, "The Eiffel Tower is", "--tokens", "3")
    assert {"before", "after"} < tried.json.keys()
    applied = home.run("--json", "apply", plan_id, *reports(home))
    document = applied.json
    assert applied.code == 0 and document["outcome"] == "committed" and document["edit_id"] == plan_id
    assert document["digest_after"] == document["digest_staged"] != document["digest_before"]
    assert document["scores"]["leakage"].keys() >= {"value", "limit", "finding"}
    assert (
        Path(document["report"]).is_file() and document["mlflow_run_id"] is None and document["mlflow_note"]
    )
    status = home.run("status", "--json").json
    assert status["digest"] == document["digest_after"] and status["plans"][0]["state"] == "committed"
    kinds = [entry["kind"] for entry in home.run("--json", "log", plan_id).json["entries"]]
    assert kinds == ["planned", "staged", "monitored", "committed", "untracked"]
    assert home.run("--json", "verify").json["digest"] == document["digest_after"]
    out = home.run("--json", "export", str(tmp_path / "out")).json
    assert sources.load(out["folder"]).digest() == out["digest"] == document["digest_after"]
    undone = home.run("--json", "rollback", plan_id, *reports(home))
    assert undone.code == 0 and undone.json["digest_after"] == document["digest_before"]
    assert home.run("--json", "recover").json["finished"] == []
    assert plan_id in home.run("report", plan_id, *reports(home)).out


ENDINGS: dict[str, tuple[Any, int, int]] = {
    "blocked": (HARD, 3, 3),
    "waits": (SOFT, 4, 4),
    "rolled back": (HARMFUL, 0, 5),
    "held": (UNDECIDED, 0, 9),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_how_plan_and_apply_end(home: Home, case: str) -> None:
    limits, at_plan, at_apply = ENDINGS[case]
    policy = ["--policy", str(home.policy(limits))] if limits else []
    ran = home.run("plan", asked(home), *policy, "--json")
    assert ran.code == at_plan
    plan_id = ran.json["plans"][0]["plan_id"]
    live = home.guard().store.digest()
    applied = home.run("apply", plan_id, *policy, *reports(home))
    assert applied.code == at_apply, applied
    assert home.guard().store.digest() == live
    if at_apply in (3, 4):
        assert applied.out == "" and len(applied.err.strip().splitlines()) == 1


def test_a_person_approves_and_another_plan_is_rejected(home: Home) -> None:
    plan_id, policy = planned(home, SOFT)
    other, _ = planned(home, SOFT, 1)
    yes = home.run("--json", "approve", plan_id, "--reason", "read the report")
    assert (
        yes.json["outcome"] == "approved"
        and yes.json["plan_digest"] == home.guard().read_plan(plan_id).digest
    )
    assert home.run("reject", other, "--reason", "not needed").code == 0
    assert home.run("apply", plan_id, *policy, *reports(home)).code == 0
    assert home.run("apply", other, *policy).code == 3
    assert home.run("approve", plan_id).code == 2


def test_a_held_edit_is_settled_by_a_word(home: Home) -> None:
    plan_id, policy = planned(home, UNDECIDED)
    assert home.run("apply", plan_id, *policy, *reports(home)).code == 9
    (entry,) = home.guard().ledger.entries("held")
    said = home.run("approve", plan_id, "--reason", "read the drift report")
    assert said.code == 0 and f"monitor's report {entry.body['drift_digest']}" in said.out
    assert home.run("apply", plan_id, *policy, *reports(home)).code == 0
    assert home.run("--json", "status").json["plans"][0]["state"] == "committed"


def test_a_waiver_on_the_command_line_is_on_record(home: Home) -> None:
    policy = ["--policy", str(home.policy(SOFT))]
    waive = ["--waive", "preop/delta_norm_ratio", "--reason", "the tests want it so", "--expires", "1h"]
    ran = home.run("--json", "plan", asked(home), *policy, *waive)
    assert ran.code == 0
    assert ran.json["plans"][0]["scores"]["delta_norm_ratio"]["waived_by"] == home.guard().user
    assert "waived" in home.run("show", ran.json["plans"][0]["plan_id"]).out


def test_out_of_order_stale_locked_and_changed_have_codes_of_their_own(home: Home) -> None:
    old, _ = planned(home, number=2)
    first, _ = planned(home, number=0)
    assert home.run("apply", first, *reports(home)).code == 0
    second, _ = planned(home, number=1)
    assert home.run("apply", second, *reports(home)).code == 0
    early = home.run("rollback", first)
    assert early.code == 8 and f"undo {second} first" in early.err
    assert home.run("apply", old).code == 8
    with VersionStore(home.folder).lock():
        locked = home.run("rollback", second)
    assert locked.code == 7 and "is being edited by process" in locked.err
    with kit.flipped(home.folder / "plans" / second / "plan.json", 40):
        changed = home.run("show", second), home.run("verify"), home.run("rollback", second)
    assert [ran.code for ran in changed] == [6, 6, 6]
    assert all(ran.out == "" and len(ran.err.strip().splitlines()) == 1 for ran in changed)
    assert home.run("verify").code == 0


def test_options_stand_before_or_after_the_verb(home: Home) -> None:
    planned(home)
    model, folder = str(home.world.model), str(home.folder)
    ways = (
        run("--model", model, "--home", folder, "--json", "status"),
        run("status", "--model", model, "--home", folder, "--json"),
        run("--json", "status", "--home", folder),
        run("--home", "elsewhere", "status", "--home", folder, "--json"),
    )
    assert len({ran.out for ran in ways}) == 1 and all(ran.code == 0 for ran in ways)


def test_the_model_that_a_home_guards_need_not_be_named_again(home: Home) -> None:
    plan_id, _ = planned(home)
    front = ("--home", str(home.folder), "--tracking-uri", kit.CLOSED_PORT)
    assert run(*front, "apply", plan_id, *reports(home)).code == 0
    assert run(*front, "rollback", plan_id, *reports(home)).code == 0


def test_a_model_may_be_named_by_a_relative_path(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.world.model.parent)
    ran = run("--model", "model", "--home", str(home.folder), "--json", "plan", asked(home))
    assert ran.code == 0, ran.err
    monkeypatch.chdir(home.folder)
    assert run("--home", ".", "verify").code == 0


def test_json_is_one_document_on_stdout_and_errors_are_json_on_stderr(home: Home) -> None:
    plan_id, _ = planned(home)
    commands = (
        ("status",), ("log",), ("verify",), ("recover",), ("doctor",), ("show", plan_id),
        ("apply", plan_id, *reports(home)), ("report", plan_id, *reports(home)),
    )  # fmt: skip
    for words in commands:
        ran = home.run(*words, "--json")
        assert ran.code == 0 and isinstance(ran.json, dict) and ran.err == "", (words, ran)
    for words, code in ((("show", "0009-none"), 2), (("apply", plan_id, "--nonsense"), 2), (("nosuch",), 2)):
        ran = home.run("--json", *words)
        assert ran.code == code and ran.out == ""
        assert (
            json.loads(ran.err).keys() == {"error", "exit_code"} and json.loads(ran.err)["exit_code"] == code
        )


@pytest.mark.parametrize(
    "words", [("status", "--nonsense"), ("nosuch",), ("plan",), ("plan", "x", "--seed", "-1")]
)
def test_what_cannot_be_parsed_ends_with_two(words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2 and ran.out == "" and "Error:" in ran.err


def test_ctrl_c_ends_with_one_line_and_nothing_half_done(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_id, _ = planned(home)
    live = home.guard().store.digest()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("guardedit.pipeline.applying.monitor", interrupted)
    ran = home.run("apply", plan_id)
    assert ran.code == 130 and len(ran.err.strip().splitlines()) == 1 and "interrupted" in ran.err
    assert home.guard().store.digest() == live and not home.guard().store.staged_ids()
    monkeypatch.setattr(planning, "_risk", interrupted)
    before = home.trace()
    assert home.run("plan", asked(home)).code == 130 and home.trace() == before


def test_a_file_of_several_requests_gives_a_plan_each(home: Home) -> None:
    ran = home.run("--json", "plan", asked(home, 0, 1))
    subjects = [made["requests"][0]["subject"] for made in ran.json["plans"]]
    assert subjects == [request_of(0).subject, request_of(1).subject]


def test_text_from_a_request_cannot_write_to_the_terminal(home: Home) -> None:
    sneaky = request_of(target_new="Rome\x1b[2J\u202e")
    path = home.requests(sneaky.model_dump(exclude_none=True))
    ran = home.run("plan", str(path))
    assert ran.code == 0 and "\x1b" not in ran.out and "\u202e" not in ran.out and "<U+001B>" in ran.out


def test_statistics_are_collected_from_the_command_line(home: Home, tmp_path: Path) -> None:
    texts, kit_folder = home.world.model.parent / "texts.jsonl", tmp_path / "kit"
    words = ("stats", "collect", "--layer", "2", "--tokens", "400", "--out", str(kit_folder))
    ran = run(*words, str(texts), "--model", str(home.world.model), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["hook_name"] == "blocks.2.mlp.hook_post" and ran.json["n_tokens"] >= 400
    assert (kit_folder / "kit.json").is_file()
    wrong = run("stats", "collect", "--layer", "9", str(texts), "--model", str(home.world.model))
    assert wrong.code == 2 and "0 to 3" in wrong.err


def as_process(home: Home, *words: str) -> Ran:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "guardedit", "--home", str(home.folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GUARDEDIT_CACHE": str(home.world.cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_process_of_its_own_ends_with_the_same_code_and_line(home: Home) -> None:
    plan_id, _ = planned(home, HARD)
    ran = as_process(home, "apply", plan_id)
    assert ran.code == 3 and ran.out == ""
    assert ran.err.startswith(f"guardedit: plan {plan_id} is blocked") and ran.err.count("\n") == 1
