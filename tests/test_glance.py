"""`status` and `log` are quick because of an index that counts only while nobody touched the ledger's file."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from audit_helpers import Story
from pipeline_helpers import flipped, run

from guardedit.audit.chain import encode_entry
from guardedit.audit.index import identity, read_index, slip_of
from guardedit.audit.ledger import Ledger
from guardedit.cli.glance import answer
from guardedit.errors import IntegrityError
from guardedit.pipeline import overview as glancing
from guardedit.pipeline.overview import overview, slips_of, states_of
from guardedit.pipeline.upkeep import status
from guardedit.records import digest_of_bytes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """A home with a plan that waits and one that is approved."""
    told = Story(tmp_path / "told")
    told.plan("0001-waits", "needs-approval")
    told.approve(told.plan("0002-approved", "needs-approval"), "ana")
    return told


def path_of(story: Story) -> Path:
    return story.home / "ledger.sqlite"


def test_the_index_says_what_the_ledger_says_and_follows_every_append(story: Story) -> None:
    path = path_of(story)
    assert read_index(path) is None
    first = slips_of(story.home)
    assert read_index(path) == first == tuple(map(slip_of, story.ledger.entries()))
    story.plan("0003-later", "auto-approved")
    Ledger(path).append(
        "untracked", {"plan_id": "0003-later", "edit_id": "0003-later", "reason": "\u2028é\n"}
    )
    assert read_index(path) == tuple(map(slip_of, story.ledger.entries()))
    assert len(slips_of(story.home)) == len(first) + 2
    assert states_of(slips_of(story.home)) == story.workspace.states()


def test_a_ledger_that_nobody_touched_is_not_read_again(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    slips_of(story.home)

    def unread(*_: object, **__: object) -> None:
        raise AssertionError("the ledger was read")

    monkeypatch.setattr(Ledger, "entries", unread)
    assert len(slips_of(story.home)) == 3
    os.utime(path_of(story))
    with pytest.raises(AssertionError, match="was read"):
        slips_of(story.home)


def test_a_changed_byte_is_seen_although_there_is_an_index(story: Story) -> None:
    slips_of(story.home)
    path = path_of(story)
    at = path.read_bytes().index(b"0001-waits")
    with flipped(path, at), pytest.raises(IntegrityError):
        slips_of(story.home)
    assert len(slips_of(story.home)) == 3


def test_an_entry_that_was_put_in_past_the_ledger_is_seen(story: Story) -> None:
    """By SQL, with a digest that fits: the head does not know it, so the index does not count."""
    slips_of(story.home)
    last = story.ledger.entries()[-1]
    data = encode_entry(last.seq + 1, last.at, "decided", {"plan_id": "0001-waits"}, last.digest)
    with sqlite3.connect(path_of(story)) as connection:
        connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?)", (last.seq + 1, data, digest_of_bytes(data))
        )
    connection.close()
    assert [slip.kind for slip in slips_of(story.home)][-1] == "decided"
    head = json.loads(path_of(story).with_suffix(".head").read_bytes())
    assert head["seq"] == last.seq


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_an_index_that_was_changed_counts_for_nothing(story: Story, damage: str) -> None:
    truth = slips_of(story.home)
    index = path_of(story).with_suffix(".index")
    whole = index.read_bytes()
    changed = {
        "flip": whole.replace(b"0001-waits", b"0001-waitz", 1), "truncate": whole[: len(whole) // 2],
        "empty": b"", "foreign": b"[1,2]\n{}",
    }[damage]  # fmt: skip
    index.write_bytes(changed)
    assert read_index(path_of(story)) is None
    assert slips_of(story.home) == truth
    assert read_index(path_of(story)) == truth


def test_an_append_does_not_bless_a_ledger_that_was_touched_before(story: Story) -> None:
    slips_of(story.home)
    os.utime(path_of(story))
    story.plan("0003-later", "auto-approved")
    assert read_index(path_of(story)) is None


def test_a_copied_or_read_only_home_is_read_all_the_same(story: Story, tmp_path: Path) -> None:
    truth = slips_of(story.home)
    copy = tmp_path / "copy"
    shutil.copytree(story.home, copy)
    assert identity(copy / "ledger.sqlite") != identity(path_of(story))
    assert read_index(copy / "ledger.sqlite") is None and slips_of(copy) == truth


def test_a_changed_record_of_what_is_live_is_an_integrity_failure(story: Story) -> None:
    before = overview(story.home, "tiny")
    assert before["digest"] == before["base_digest"] == story.tiny.store.digest()
    for name in ("base.json", "CURRENT"):
        with flipped(story.home / "model" / name, 40), pytest.raises(IntegrityError):
            overview(story.home, "tiny")
    story.tiny.apply("0001-waits", "layers.1.down.weight")
    after = overview(story.home, "tiny")
    assert (after["digest"], after["version"]) == (story.tiny.store.digest(), "000001-0001-waits")
    version = story.home / "model" / "versions" / "000001-0001-waits" / "version.json"
    with flipped(version, 100), pytest.raises(IntegrityError):
        overview(story.home, "tiny")
    assert overview(story.home, "tiny") == status(story.workspace)


@pytest.mark.parametrize(
    "words",
    [
        ("status",), ("log",), ("--json", "status"), ("status", "--json"), ("log", "0002-approved"),
        ("status", "--model", "other"), ("--home", "elsewhere", "log"),
    ],
)  # fmt: skip
def test_the_quick_answer_is_the_one_of_the_whole_command_line(
    story: Story, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    arguments = [*words, "--home", str(story.home)]
    quick = answer(arguments)
    assert quick is not None
    monkeypatch.setattr("guardedit.cli.glance.answer", lambda _: None)
    whole = run(*arguments)
    assert whole.code == 0 and whole.out == quick + "\n"


@pytest.mark.parametrize(
    "words",
    [("log", "--json"), ("status", "x"), ("status", "--nonsense"), ("status", "--home"), ("plan", "x"), ()],
)
def test_anything_else_is_left_to_the_whole_command_line(words: tuple[str, ...]) -> None:
    assert answer(words) is None


def test_a_broken_chain_ends_with_its_exit_code(story: Story) -> None:
    path = path_of(story)
    at = path.read_bytes().index(b"0001-waits")
    with flipped(path, at):
        for verb in ("status", "log"):
            ran = run("--home", str(story.home), verb)
            assert ran.code == 6 and "was changed" in ran.err and not ran.out


def test_status_and_log_load_nothing_heavy(story: Story) -> None:
    slips_of(story.home)
    for verb in ("status", "log"):
        code = (
            "import sys; from guardedit.cli import main\ntry:\n    main()\nexcept SystemExit as stop:\n"
            "    heavy = {'torch', 'numpy', 'pydantic', 'typer', 'rich', 'sqlite3'} & set(sys.modules)\n"
            "    assert not heavy and not stop.code, heavy"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "--home", str(story.home), verb],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        assert "0001-waits" in done.stdout


def test_the_record_is_read_without_torch() -> None:
    code = (
        "import sys, guardedit.pipeline.reviewing, guardedit.pipeline.publishing, guardedit.pipeline.sealing\n"
        "import guardedit.cli.briefing; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_is_shown_of_reviews_needs_no_model() -> None:
    assert glancing.overview(Path("/nonexistent"), "tiny")["reviews"] == []
