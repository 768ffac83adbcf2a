"""The ledger: what was written is what is read, in order, and a change is named."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

import guardedit.audit.ledger as ledger_room
from guardedit.audit.chain import GENESIS, Entry, encode_entry
from guardedit.audit.ledger import Head, Ledger
from guardedit.errors import BadRequestError, IntegrityError, LockedError
from guardedit.records import Waiver, digest_of_bytes

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append(
        "planned", {"plan_id": "p1", "text": "Señor · ‖ΔW‖ · \u202eevil", "value": 0.1 + 0.2}, at=NOON
    )
    ledger.append("staged", {"plan_id": "p1", "edit_id": "e1"}, at=NOON)
    ledger.append(
        "committed", {"plan_id": "p1", "edit_id": "e1", "deep": {"list": [1, None, True, -0.5]}}, at=NOON
    )
    ledger.append("planned", {"plan_id": "p2"}, at=NOON)
    return ledger


def _rewrite(ledger: Ledger, statement: str, *values: object) -> None:
    """What somebody with the file in hand can do: drop the triggers first."""
    with sqlite3.connect(ledger.path) as connection:
        for name in ("no_update", "no_delete", "only_next"):
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement, values)
    connection.close()


def test_asking_creates_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home" / "ledger.sqlite")
    assert (ledger.entries(), ledger.head(), ledger.verify()) == ((), None, None)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_json_cannot_carry_is_refused_before_a_file_exists(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home" / "ledger.sqlite")
    for value in (float("nan"), float("inf"), object(), "\ud800", b"bytes"):
        with pytest.raises(BadRequestError, match="JSON cannot carry"):
            ledger.append("planned", {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_what_was_appended_is_read_back_in_order(ledger: Ledger) -> None:
    entries = ledger.entries()
    assert [e.seq for e in entries] == [1, 2, 3, 4]
    assert entries[0].body == {"plan_id": "p1", "text": "Señor · ‖ΔW‖ · \u202eevil", "value": 0.1 + 0.2}
    assert entries[0].at == "2030-01-01T12:00:00+00:00"
    assert [e.prev for e in entries] == [GENESIS, *(e.digest for e in entries[:-1])]


def test_entries_are_found_by_kind_edit_and_plan(ledger: Ledger) -> None:
    assert [e.seq for e in ledger.entries("planned")] == [1, 4]
    assert [e.seq for e in ledger.entries(edit_id="e1")] == [2, 3]
    assert [e.seq for e in ledger.entries("committed", plan_id="p1")] == [3]
    assert ledger.entries(edit_id="nobody") == ()


def test_a_record_is_appended_as_its_fields(ledger: Ledger) -> None:
    waiver = Waiver(metric="preop/leakage", author="ana", reason="a documented reason", expires="2031-01-01")
    assert ledger.append("waived", waiver).body == waiver.model_dump(mode="json")


def test_append_returns_what_a_reader_gets_and_moves_the_head(ledger: Ledger) -> None:
    entry = ledger.append("approved", {"plan_id": "p2"})
    assert ledger.entries()[-1] == entry
    assert ledger.head() == Head(5, entry.digest) == ledger.verify()


def test_a_file_written_by_the_documented_recipe_is_accepted(tmp_path: Path) -> None:
    """The recipe, by hand: digest of canonical JSON that names the digest before."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    entry = ledger.append("planned", {"b": 1, "a": 2}, at=NOON)
    text = (
        '{"at":"2030-01-01T12:00:00+00:00","body":{"a":2,"b":1},"format":1,"kind":"planned",'
        f'"prev":"sha256:{"0" * 64}","seq":1}}'
    )
    assert entry.digest == digest_of_bytes(text.encode())


def test_sql_refuses_to_change_delete_or_squeeze_in(ledger: Ledger) -> None:
    connection = sqlite3.connect(ledger.path)
    for statement in (
        "UPDATE entries SET digest = 'x' WHERE seq = 1",
        "DELETE FROM entries WHERE seq = 4",
        "INSERT INTO entries VALUES (9, x'00', 'x')",
        "INSERT OR REPLACE INTO entries VALUES (2, x'00', 'x')",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()
    assert ledger.verify() is not None


def test_the_view_for_people_with_sql_shows_kind_and_ids(ledger: Ledger) -> None:
    connection = sqlite3.connect(ledger.path)
    rows = connection.execute("SELECT seq, kind, edit_id, plan_id FROM log").fetchall()
    connection.close()
    assert rows[2] == (3, "committed", "e1", "p1")


def test_an_edited_entry_is_named(ledger: Ledger) -> None:
    _rewrite(ledger, "UPDATE entries SET entry = CAST(replace(entry, 'e1', 'e2') AS BLOB) WHERE seq = 2")
    for ask in (ledger.entries, ledger.head, ledger.verify):
        with pytest.raises(IntegrityError, match="entry 2") as caught:
            ask()
        assert caught.value.exit_code == 6


def test_an_edited_entry_with_a_fitting_digest_breaks_the_link_of_the_next(ledger: Ledger) -> None:
    entry = ledger.entries()[1]
    forged = encode_entry(2, entry.at, "staged", {"edit_id": "forged"}, entry.prev)
    _rewrite(
        ledger, "UPDATE entries SET entry = ?, digest = ? WHERE seq = 2", forged, digest_of_bytes(forged)
    )
    with pytest.raises(IntegrityError, match="entry 3 does not follow"):
        ledger.verify()


@pytest.mark.parametrize("seq", [1, 2, 3, 4])
def test_a_dropped_entry_is_noticed_also_the_last_one(ledger: Ledger, seq: int) -> None:
    _rewrite(ledger, "DELETE FROM entries WHERE seq = ?", seq)
    with pytest.raises(IntegrityError):
        ledger.verify()
    with pytest.raises(IntegrityError):
        ledger.append("planned", {}) if seq == 4 else ledger.entries()


def test_swapped_entries_are_noticed(ledger: Ledger) -> None:
    _rewrite(
        ledger, "UPDATE entries SET seq = CASE seq WHEN 2 THEN 30 WHEN 3 THEN 20 END WHERE seq IN (2, 3)"
    )
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("UPDATE entries SET seq = seq / 10 WHERE seq > 9")
    connection.close()
    with pytest.raises(IntegrityError, match="entry 2 was moved"):
        ledger.verify()


def test_a_lost_file_or_a_lost_head_is_noticed(ledger: Ledger) -> None:
    head = ledger.path.with_suffix(".head")
    kept = head.read_bytes()
    head.unlink()
    with pytest.raises(IntegrityError, match="names the last entry"):
        ledger.entries()
    head.write_bytes(kept)
    ledger.path.unlink()
    for ask in (ledger.verify, lambda: ledger.append("planned", {})):
        with pytest.raises(IntegrityError, match="is gone"):
            ask()
    assert not ledger.path.exists()


def test_a_history_rewritten_with_its_head_is_caught_by_a_head_kept_elsewhere(ledger: Ledger) -> None:
    kept = ledger.head()
    for path in (ledger.path, ledger.path.with_suffix(".head")):
        path.unlink()
    for _ in range(5):
        ledger.append("planned", {"plan_id": "another story"})
    assert ledger.verify() is not None
    with pytest.raises(IntegrityError, match="kept elsewhere"):
        ledger.verify(anchor=kept)


def test_a_kept_head_still_fits_after_more_was_appended(ledger: Ledger) -> None:
    kept = ledger.head()
    ledger.append("planned", {})
    ledger.verify(anchor=kept)


def test_a_head_that_a_crash_left_one_behind_is_no_alarm(ledger: Ledger) -> None:
    """The entry is durable before the head is: a kill in between must not make the ledger unusable."""
    head = ledger.path.with_suffix(".head")
    kept = head.read_bytes()
    ledger.append("planned", {"plan_id": "p3"})
    head.write_bytes(kept)
    assert len(ledger.entries()) == 5
    ledger.append("planned", {"plan_id": "p4"})
    assert ledger.verify() is not None and len(ledger.entries()) == 6


def test_a_copy_that_its_reader_may_not_write_beside_can_be_read(ledger: Ledger) -> None:
    """WAL wants to make a file beside the database; an auditor's copy may lie where that is forbidden."""
    folder = Path(tempfile.mkdtemp())
    for path in (ledger.path, ledger.path.with_suffix(".head")):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).chmod(0o444)
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write everywhere
            copy = Ledger(folder / ledger.path.name)
            status = 0 if len(copy.entries()) == 4 and copy.verify() is not None else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["ledger.head", "ledger.sqlite"]
    folder.chmod(0o755)
    shutil.rmtree(folder)


def _append_many(path: Path, name: str) -> None:
    for i in range(15):
        Ledger(path).append("planned", {"plan_id": f"{name}-{i}"})


def test_four_processes_writing_a_new_ledger_at_once_make_one_whole_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, str(i))) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0, 0, 0]
    assert len({e.body["plan_id"] for e in Ledger(path).entries()}) == 60
    head = Ledger(path).verify()
    assert head is not None and head.seq == 60


def test_a_writer_that_never_finishes_makes_the_next_one_say_so(ledger: Ledger) -> None:
    connection = sqlite3.connect(ledger.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(LockedError, match="another process"):
        Ledger(ledger.path, timeout_s=0.05).append("planned", {})
    connection.execute("ROLLBACK")
    connection.close()
    assert ledger.append("planned", {}).seq == 5


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each whole reading had."""
    readings: list[int] = []
    whole = ledger_room.read_chain

    def read(rows: list[tuple[int, bytes, str]]) -> Iterator[Entry]:
        readings.append(len(rows))
        return whole(rows)

    monkeypatch.setattr(ledger_room, "read_chain", read)
    return readings


def test_a_long_chain_is_read_and_checked_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, long = _counted(monkeypatch), Ledger(ledger.path, keep_from=4)
    assert [len(long.entries()), len(long.entries("planned")), long.head() is not None] == [4, 2, True]
    long.append("committed", {"plan_id": "p2"}, at=NOON)
    assert [entry.seq for entry in long.entries()] == [1, 2, 3, 4, 5] and readings == [4]
    assert long.entries() == Ledger(ledger.path).entries()
    long.verify()
    assert readings == [4, 5, 5], "verify reads, whatever was read before"


def test_an_append_by_somebody_else_is_seen_by_who_has_read_the_chain(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings, long = _counted(monkeypatch), Ledger(ledger.path, keep_from=1)
    assert len(long.entries()) == 4
    ledger.append("planned", {"plan_id": "p3"}, at=NOON)
    assert long.entries()[-1].body == {"plan_id": "p3"}
    ledger.append("planned", {"plan_id": "p4"}, at=NOON)
    mine = long.append("planned", {"plan_id": "p5"}, at=NOON)
    assert mine.seq == 7 and [entry.seq for entry in long.entries()] == list(range(1, 8))
    assert readings == [4, 5, 7]


def test_a_change_of_the_file_is_seen_by_who_has_read_the_chain(ledger: Ledger) -> None:
    long = Ledger(ledger.path, keep_from=1)
    assert len(long.entries()) == 4
    time.sleep(0.02)
    _rewrite(ledger, "UPDATE entries SET digest = ? WHERE seq = 2", GENESIS)
    with pytest.raises(IntegrityError, match="entry 2"):
        long.entries()
