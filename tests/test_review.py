"""The reviewers' desk: only a typed word with a reason decides, by the same way as approve and reject."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys

import pytest
from pipeline_helpers import HARMFUL, SOFT, UNDECIDED, Home, Ran, home, request_of, world

from guardedit.errors import NeedsApprovalError
from guardedit.gate.keys import new_key
from guardedit.pipeline.signing import trust_key

__all__ = ["home", "world"]

REASON = "looked at it: the tests want it"


class Typed(io.StringIO):
    """A terminal at which somebody types these lines."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def two(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A plan that waits, and an edit that is held; made once, and copied."""
    kept = tmp_path_factory.getbasetemp() / "two-that-wait"
    if kept.is_dir():
        shutil.copytree(kept, home.folder)
        return home
    guard = home.guard(UNDECIDED)
    held = guard.plan(request_of(1))
    guard.apply(held.plan_id)
    home.guard(SOFT).plan(request_of(0))
    shutil.copytree(home.folder, kept)
    return home


def review(home: Home, monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = ()) -> Ran:
    monkeypatch.setattr(sys, "stdin", Typed("".join(f"{line}\n" for line in lines)))
    return home.run("review", *options, mlflow=None)


def states(home: Home) -> list[str]:
    return list(home.guard().states().values())


def test_each_is_shown_and_the_words_are_those_of_approve_and_reject(
    two: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = review(two, monkeypatch, "r", "not this one", "approve", REASON)
    assert ran.code == 0, ran.err
    assert "1 of 2" in ran.out and "2 of 2" in ran.out and "0 left" in ran.out
    assert (
        "HELD" in ran.out and "NEEDS-APPROVAL" in ran.out and "[a]pprove  [r]eject  [s]kip  [q]uit" in ran.out
    )
    held, waiting = (entry.body["decision"] for entry in two.guard().ledger.entries("decided"))
    assert (held["outcome"], held["reason"]) == ("rejected", "not this one") and held["drift_digest"]
    assert (waiting["outcome"], waiting["reason"]) == ("approved", REASON)
    assert states(two) == ["held", "approved"]


@pytest.mark.parametrize(
    "lines",
    [
        ("", ""),
        ("s", "s"),
        ("q",),
        (),
        ("a", "", "s", "q"),
        ("yes", "y", "ok", "q"),
        ("a",),
        ("a", "  ", "q"),
    ],
)
def test_nothing_else_decides(two: Home, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...]) -> None:
    """A bare Enter, a skip, the end of the input, an answer that is none, a word without a reason."""
    before = two.trace()
    ran = review(two, monkeypatch, *lines)
    assert ran.code == 0 and "2 left" in ran.out
    assert two.trace() == before


def test_a_pipe_is_refused_and_json_lists_the_queue(two: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    before = two.trace()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\n{REASON}\n"))
    ran = two.run("review", mlflow=None)
    assert ran.code == 2 and "no terminal" in ran.err and not ran.out
    listed = two.run("review", "--json", mlflow=None).json["queue"]
    assert [one["state"] for one in listed] == ["held", "needs-approval"]
    assert listed[0]["postop"]["verdict"] == "inconclusive" and listed[0]["drift_digest"]
    assert two.trace() == before


def test_a_key_that_may_not_decide_is_refused_and_asked_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = home.folder.parent / "keys"
    policy = home.policy(SOFT, 'profile = "team"')
    for name, role in (("ana", "reviewer"), ("ben", "proposer"), ("gus", "runner")):
        new_key(keys, name)
        trust_key(home.guard(), keys / f"{name}.pub", role)  # type: ignore[arg-type]
    plan = home.guard(policy=policy, keys=keys, key="ben").plan(request_of())
    for name in ("gus", "ben"):
        options = ("--keys", str(keys), "--key", name)
        ran = review(home, monkeypatch, "a", REASON, "q", options=options)
        assert ran.code == 0 and "refused: " in ran.out and "1 left" in ran.out
    unsigned = review(home, monkeypatch, "a", REASON, "q")
    assert "refused: " in unsigned.out and states(home) == ["needs-approval"]
    ran = review(home, monkeypatch, "a", REASON, options=("--keys", str(keys), "--key", "ana"))
    assert "approved by ana" in ran.out and states(home) == ["approved"]
    (entry,) = home.guard().ledger.entries("decided")
    assert entry.body["envelope"] and entry.body["decision"]["plan_digest"] == plan.digest
    with pytest.raises(NeedsApprovalError):
        home.guard(policy=policy, keys=keys, key="ben").approve(plan.plan_id, REASON)


def test_of_a_plan_made_anew_that_is_not_worse_only_the_difference_is_shown(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(SOFT)
    old = guard.plan(request_of())
    first = review(home, monkeypatch, "q").out
    (found,) = guard.replan(old.plan_id)
    assert found.new is not None
    again = review(home, monkeypatch, "q").out
    assert "NEEDS-APPROVAL" in first and "FAIL soft" in first
    assert "not worse" in again and "the solved change is the same" in again
    assert "FAIL soft" not in again and "would move" not in again
    shown = home.run("show", found.new.plan_id, mlflow=None)
    assert "not worse" in shown.out and "FAIL soft" in shown.out
    assert f"superseded by {found.new.plan_id}" in home.run("show", old.plan_id, mlflow=None).out


def test_replan_on_the_command_line_ends_as_plan_does(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    ran = home.run("replan", plan.plan_id, "--policy", str(home.policy(SOFT)), mlflow=None)
    assert ran.code == 4 and "made anew from" in ran.out
    policy = str(home.policy(HARMFUL))
    found = home.run("replan", "--policy", policy, "--json", mlflow=None)
    (told,) = found.json["replanned"]
    assert found.code == 0 and told["outcome"] == {"before": "needs-approval", "after": "auto-approved"}
    assert told["plan"]["plan_id"] == told["new"]
    none = home.run("replan", "--policy", policy, mlflow=None)
    assert none.code == 0 and "nothing is stale" in none.out


def test_a_real_terminal_is_asked(two: Home) -> None:
    """The command in a process of its own, at a pseudo-terminal; torch stays away."""
    ours, theirs = pty.openpty()
    os.write(ours, f"a\n{REASON}\nq\n".encode())
    code = (
        "import sys; from guardedit.cli import main\ntry:\n    main()\nexcept SystemExit as stop:\n"
        "    assert 'torch' not in sys.modules\n    sys.exit(stop.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--home", str(two.folder), "review"],
        stdin=theirs, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert "approved by" in done.stdout and "1 left" in done.stdout
