"""A ledger as a file: it verifies anywhere and for ever, goes whole into an empty home, and shows what was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from audit_helpers import OPEN, story, whole_story
from pipeline_helpers import Home, home, request_of, run, world

from guardedit.audit.chain import Entry, encode_entry
from guardedit.audit.exporting import entry_line
from guardedit.audit.importing import read_export
from guardedit.config import Settings
from guardedit.errors import BadRequestError, IntegrityError, NotFoundError
from guardedit.pipeline.auditing import audit
from guardedit.pipeline.exchanging import export_ledger, import_ledger, verify_export
from guardedit.pipeline.workspace import Workspace
from guardedit.records import digest_of_bytes

__all__ = ["home", "story", "world"]

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(DATA.glob("ledger-*.jsonl"))
SIGNED = DATA / "ledger-signed-0.1.0.jsonl"
STORY = DATA / "ledger-story-0.1.0.jsonl"


def workspace(folder: Path) -> Workspace:
    return Workspace(Settings(model="tiny", home=folder))


def test_there_are_exported_ledgers_of_this_version() -> None:
    assert {SIGNED, STORY} <= set(GOLDEN)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_ledger_that_was_exported_once_verifies_for_ever(path: Path, tmp_path: Path) -> None:
    found = verify_export(path)
    assert found["checked"][:4] == ["form", "chain", "head", "replay"]
    import_ledger(workspace(tmp_path / "home"), path)
    again = tmp_path / "again.jsonl"
    export_ledger(workspace(tmp_path / "home"), again, blobs=found["files"] > 0)
    assert again.read_bytes() == path.read_bytes()


def test_the_golden_ledger_holds_every_kind_of_signed_word() -> None:
    found = verify_export(SIGNED)
    assert (found["key_statements"], found["policy_statements"], found["signatures"]) == (8, 3, 7)
    assert "checkpoint" in found["checked"]
    kinds = {entry.kind for entry in read_export(SIGNED).entries}
    assert {"key-trusted", "key-revoked", "policy-signed", "policy-withdrawn", "planned", "decided", "reviewed",
            "staged", "committed", "rolled-back"} <= kinds  # fmt: skip
    assert "files" in verify_export(STORY)["checked"]


def test_an_imported_ledger_is_audited_as_the_first_was(tmp_path: Path) -> None:
    told = whole_story(tmp_path / "s")
    file = tmp_path / "ledger.jsonl"
    assert export_ledger(told.workspace, file, blobs=True)["files"] == 7
    import_ledger(workspace(tmp_path / "home"), file)
    there = workspace(tmp_path / "home")
    assert there.ledger.entries() == told.workspace.ledger.entries()
    assert audit(there, OPEN).evidence.edits == audit(told.workspace, OPEN).evidence.edits


def test_equal_ledgers_give_equal_files(story: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_ledger(story.workspace, tmp_path / name, blobs=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.head", "plans", "model", "checkpoints"])
def test_a_home_that_has_a_record_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / name).mkdir()
    with pytest.raises(BadRequestError, match="empty"):
        import_ledger(workspace(folder), SIGNED)


def _rewritten(entries: list[Entry]) -> list[bytes]:
    """The lines of a chain made anew from these entries: every digest and link fits."""
    lines, prev = [], "sha256:" + "0" * 64
    for seq, entry in enumerate(entries, start=1):
        data = encode_entry(seq, entry.at, entry.kind, entry.body, prev)
        prev = digest_of_bytes(data)
        lines.append(entry_line(data, prev))
    return lines


def _lines(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    first, *rest = path.read_bytes().rstrip(b"\n").split(b"\n")
    return json.loads(first), rest


def _write(path: Path, head: dict[str, Any], lines: list[bytes]) -> Path:
    first = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(b"\n".join([first, *lines]) + b"\n")
    return path


CHANGES: dict[str, Any] = {
    "edited": lambda head, lines: (head, [lines[0].replace(b"ana", b"eva"), *lines[1:]]),
    "dropped": lambda head, lines: ({**head, "entries": head["entries"] - 1}, [*lines[:3], *lines[4:]]),
    "reordered": lambda head, lines: (head, [lines[1], lines[0], *lines[2:]]),
    "inserted": lambda head, lines: ({**head, "entries": head["entries"] + 1}, [lines[0], *lines]),
    "cut at the tail": lambda head, lines: (head, lines[:-1]),
    "cut at the tail, counted anew": lambda head, lines: ({**head, "entries": head["entries"] - 1}, lines[:-1]),
    "cut before its checkpoint": lambda head, lines: (
        {**head, "entries": 5, "head": json.loads(lines[4])["digest"]}, lines[:5]
    ),
    "another head": lambda head, lines: ({**head, "head": "sha256:" + "1" * 64}, lines),
    "a key more in the first line": lambda head, lines: ({**head, "more": 1}, lines),
    "a count that is none": lambda head, lines: ({**head, "entries": True}, lines),
    "a version to come": lambda head, lines: ({**head, "version": 2}, lines),
    "no entry": lambda head, lines: ({**head, "entries": 0}, []),
    "a line that is no entry": lambda head, lines: (head, [b"{}", *lines[1:]]),
}  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
def test_an_exported_ledger_that_was_changed_is_refused_and_nothing_is_imported(
    tmp_path: Path, how: str
) -> None:
    path = _write(tmp_path / "changed.jsonl", *CHANGES[how](*_lines(SIGNED)))
    with pytest.raises(IntegrityError) as caught:
        verify_export(path)
    assert caught.value.exit_code == 6
    with pytest.raises(IntegrityError):
        import_ledger(workspace(tmp_path / "home"), path)
    assert not (tmp_path / "home").exists()


def test_a_story_written_anew_with_fitting_digests_fails_at_a_signature_or_a_checkpoint(
    tmp_path: Path,
) -> None:
    """Every digest fits; what the forger lacks is a key and the checkpoint that lies elsewhere."""
    entries = list(read_export(SIGNED).entries)
    at = next(i for i, entry in enumerate(entries) if entry.kind == "decided")
    body = json.loads(json.dumps(entries[at].body))
    body["decision"]["reason"] = "nobody looked at it at all"
    forged = [*entries]
    forged[at] = Entry(0, entries[at].at, "decided", body, "", "")
    for story_, said in ((forged, rf"entry {at + 1}\b"), (entries[:6], "kept")):
        lines = _rewritten(story_)
        head, _ = _lines(SIGNED)
        fresh = {**head, "entries": len(lines), "head": json.loads(lines[-1])["digest"], "checkpoint": None}
        path = _write(tmp_path / "anew.jsonl", fresh, lines)
        kept = tmp_path / "kept.json"
        kept.write_text(json.dumps(head["checkpoint"]))
        with pytest.raises(IntegrityError, match=said):
            verify_export(path, anchor=kept)


def test_a_file_in_an_export_is_one_that_the_ledger_names(tmp_path: Path) -> None:
    head, lines = _lines(STORY)
    n = head["entries"]
    blob = json.loads(lines[n])
    changes = {
        "another's bytes": {**blob, "data": json.loads(lines[n + 1])["data"]},
        "a path out of the home": {**blob, "path": "../../evil"},
        "a path that the ledger does not name": {**blob, "path": "plans/0009-x/plan.json"},
        "no base64": {**blob, "data": "*"},
    }
    for changed in changes.values():
        line = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(IntegrityError):
            verify_export(_write(tmp_path / "x.jsonl", head, [*lines[:n], line, *lines[n + 1 :]]))
    twice = [*lines[:n], lines[n], lines[n]]
    fewer = {**head, "blobs": head["blobs"] - 1}
    for changed_head, changed_lines in ((head, twice), (fewer, lines[:-1])):
        with pytest.raises(IntegrityError):
            verify_export(_write(tmp_path / "x.jsonl", changed_head, changed_lines))


def test_a_plan_whose_name_leads_out_of_the_home_is_not_written(tmp_path: Path) -> None:
    """The forger also rewrote the ledger, so that it names the path: the path is refused all the same."""
    entries, (head, lines) = list(read_export(STORY).entries), _lines(STORY)
    changed = []
    for entry in entries:
        body = json.loads(json.dumps(entry.body))
        if body.get("plan_id") == "0002-waits":
            body["plan_id"] = "../../evil"
        changed.append(Entry(0, entry.at, entry.kind, body, "", ""))
    made = _rewritten(changed)
    blobs = sorted(
        line.replace(b"plans/0002-waits", b"plans/../../evil") for line in lines[head["entries"] :]
    )
    fresh = {**head, "head": json.loads(made[-1])["digest"]}
    path = _write(tmp_path / "evil.jsonl", fresh, [*made, *blobs])
    with pytest.raises(IntegrityError, match="no place"):
        import_ledger(workspace(tmp_path / "a" / "b" / "home"), path)
    assert not (tmp_path / "a").exists()


def test_a_ledger_travels_by_its_commands(home: Home, tmp_path: Path) -> None:
    file, there = tmp_path / "ledger.jsonl", ("--home", str(tmp_path / "there"))
    assert home.run("ledger", "export", str(file), mlflow=None).code == 2, "there is nothing yet"
    plan = home.guard().plan(request_of())
    made = home.run("--json", "ledger", "export", str(file), "--blobs", mlflow=None)
    assert made.code == 0 and made.json["files"] == 2, made.err
    for words in (("verify", str(file), "--alone"), ("--home", str(home.folder), "verify", str(file))):
        assert run(*words).code == 0
    assert run(*there, "ledger", "import", str(file)).code == 0
    assert plan.plan_id in run(*there, "log").out
    assert run(*there, "ledger", "import", str(file)).code == 2
    home.guard().plan(request_of(1))
    assert run("--home", str(home.folder), "verify", str(file)).code == 0, (
        "a ledger that has grown bears it out"
    )
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "there", other)
    from guardedit.audit.ledger import Ledger

    Ledger(other / "ledger.sqlite").append("outdated", {"moved": []})
    assert run("--home", str(other), "ledger", "export", str(file)).code == 0
    assert run("--home", str(home.folder), "verify", str(file)).code == 6
    with pytest.raises(NotFoundError):
        read_export(tmp_path / "nowhere.jsonl")
