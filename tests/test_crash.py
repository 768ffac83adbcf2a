"""Killed at any system call that changes the disk, the store is before or after, never between.

Each verb is run in a forked process that kills itself at its n-th call of fsync, rename, mkdir and so on, for every n.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import NAMES, Tiny, make_folder, make_store, random_bytes

from guardedit.audit.export import export
from guardedit.audit.files import TEMP_PREFIX
from guardedit.audit.ledger import Ledger
from guardedit.audit.versions import VersionStore
from guardedit.errors import StorageError

A, B = NAMES[1:3]
CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
TAKING_SPACE = CALLS[:4]
KILLED, DONE, REFUSED, OTHER = -signal.SIGKILL, 0, 3, 4
Verb = Callable[[VersionStore], object]


def _count_calls(at: int, action: Callable[[], None], calls: tuple[str, ...] = CALLS) -> list[int]:
    """From now on, in this process, do `action` before the `at`-th of these calls; returns the live counter."""
    seen = [0]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen[0] += 1
            if seen[0] == at:
                action()
            return real(*args, **kwargs)

        return call

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    return seen


def _in_child(work: Callable[[], object], prepare: Callable[[], object]) -> int:
    """Exit status of a forked process: killed, done, refused with StorageError, or anything else."""
    child = os.fork()
    if child == 0:
        status = OTHER
        try:
            prepare()
            work()
            status = DONE
        except StorageError:
            status = REFUSED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _tree(folder: Path) -> dict[str, bytes]:
    """Contents, without the lock files, which say nothing."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("lock")}


@pytest.fixture
def start(tmp_path: Path) -> Tiny:
    """One edit live, another staged on it."""
    tiny = make_store(tmp_path / "start")
    tiny.apply("e1", A)
    tiny.store.stage("e2", {A: random_bytes(2), B: random_bytes(3)})
    return tiny


def _copy(tiny: Tiny, home: Path) -> Tiny:
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(tiny.home, home)
    return Tiny(home, tiny.folder, tiny.manifest)


VERBS: dict[str, Verb] = {
    "stage": lambda store: store.stage("e3", {B: random_bytes(9)}),
    "stage again": lambda store: store.stage("e2", {A: random_bytes(2), B: random_bytes(3)}),
    "commit": lambda store: store.commit("e2"),
    "roll back": lambda store: store.roll_back("e1"),
    "drop": lambda store: store.drop_staged("e2"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_killed_anywhere_the_live_model_is_the_old_or_the_new_and_recovery_finishes(
    start: Tiny, tmp_path: Path, verb: str
) -> None:
    before = start.store.digest()
    whole = _copy(start, tmp_path / "whole")
    VERBS[verb](whole.store)
    after, kills = whole.store.digest(), 0
    for at in range(1, 200):
        tiny = _copy(start, tmp_path / "home")
        status = _in_child(lambda t=tiny: VERBS[verb](t.store), lambda n=at: _count_calls(n, _kill))
        if status == DONE:
            break
        assert status == KILLED
        kills += 1
        live = tiny.store.digest()
        assert live in (before, after)
        assert tiny.store.verify().digest == live
        first = tiny.store.recover()
        settled = _tree(tiny.home)
        second = tiny.store.recover()
        assert (second.restaged, second.dropped, second.staged) == ((), (), first.staged)
        assert _tree(tiny.home) == settled
        assert tiny.store.digest() == live == tiny.store.verify().digest
        assert not list(tiny.home.rglob(f"{TEMP_PREFIX}*"))
        if live == before:
            _finish(tiny, verb)
        assert tiny.store.digest() == after
    assert kills >= 3


def _finish(tiny: Tiny, verb: str) -> None:
    """What was interrupted can be asked for again; an unpublished commit is still staged."""
    if verb == "commit":
        assert "e2" in tiny.store.staged_ids()
    VERBS[verb](tiny.store)


def test_killed_during_recovery_it_recovers(start: Tiny, tmp_path: Path) -> None:
    """A commit dies before the pointer switch; then every recovery dies too, one call later each time."""
    tiny = _copy(start, tmp_path / "home")
    before = tiny.store.digest()
    at = 1
    while not (tiny.home / "model" / "versions" / "000002-e2").exists():
        tiny = _copy(start, tmp_path / "home")
        _in_child(lambda t=tiny: t.store.commit("e2"), lambda n=at: _count_calls(n, _kill))
        at += 1
    assert tiny.store.digest() == before
    for n in range(1, 60):
        if _in_child(lambda: tiny.store.recover(), lambda n=n: _count_calls(n, _kill)) == DONE:
            break
        assert tiny.store.verify().digest == before
    assert tiny.store.staged_ids() == ("e2",)
    assert tiny.store.commit("e2").digest == tiny.store.digest() != before


def test_a_store_made_before_a_fork_is_locked_out_and_let_in_like_any_other(start: Tiny) -> None:
    store = start.store
    with store.lock():
        assert _in_child(lambda: store.drop_staged("e2"), lambda: None) == OTHER
    assert store.staged_ids() == ("e2",)
    assert _in_child(lambda: store.drop_staged("e2"), lambda: None) == DONE
    assert store.staged_ids() == ()


def test_killed_during_the_first_import_it_can_be_done_again(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "base")
    for at in range(1, 60):
        home = tmp_path / f"home{at}"
        store = VersionStore(home)
        status = _in_child(
            lambda s=store: s.import_base(manifest, tmp_path / "base"), lambda n=at: _count_calls(n, _kill)
        )
        assert status in (KILLED, DONE)
        store.recover()
        store.import_base(manifest, tmp_path / "base")
        assert store.verify().n_versions == 0
        if status == DONE:
            return
    raise AssertionError("the import never got through")


@pytest.mark.parametrize("verb", ["stage", "commit", "roll back"])
def test_a_disk_that_fills_up_at_any_call_is_one_storage_error_and_the_model_as_it_was(
    start: Tiny, tmp_path: Path, verb: str
) -> None:
    before, refusals = start.store.digest(), 0
    whole = _copy(start, tmp_path / "whole")
    VERBS[verb](whole.store)
    for at in range(1, 200):
        tiny = _copy(start, tmp_path / "home")
        status = _in_child(
            lambda t=tiny: VERBS[verb](t.store), lambda n=at: _count_calls(n, _disk_full, TAKING_SPACE)
        )
        if status == DONE and at > 20:
            break
        assert status in (REFUSED, DONE), f"call {at}"
        refusals += status == REFUSED
        assert tiny.store.verify().digest in (before, whole.store.digest())
        tiny.store.recover()
    assert refusals >= 3


def test_no_space_for_an_image_leaves_every_file_as_it_was(start: Tiny, tmp_path: Path) -> None:
    """A real refusal by the kernel: no file may grow beyond 50 bytes, an image has 96."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))

    before = _tree(start.home)
    assert _in_child(lambda: start.store.stage("e3", {B: random_bytes(9)}), limit) == REFUSED
    assert _tree(start.home) == before
    assert _in_child(lambda: export(start.store, tmp_path / "out"), limit) == REFUSED
    assert not (tmp_path / "out").exists()


def test_a_ledger_killed_anywhere_keeps_a_whole_chain_and_goes_on(tmp_path: Path) -> None:
    for at in range(1, 40):
        path = tmp_path / f"{at}" / "ledger.sqlite"
        Ledger(path).append("planned", {"n": 1})
        status = _in_child(
            lambda p=path: Ledger(p).append("planned", {"n": 2}), lambda n=at: _count_calls(n, _kill)
        )
        assert [e.body["n"] for e in Ledger(path).entries()] in ([1], [1, 2])
        Ledger(path).append("planned", {"n": 3})
        assert Ledger(path).verify() is not None
        if status == DONE:
            return
    raise AssertionError("the append never got through")


def test_a_ledger_that_runs_out_of_space_refuses_and_is_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append("planned", {"n": 1})
    kept = ledger.entries()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    assert _in_child(lambda: ledger.append("planned", {"text": "x" * 100_000}), limit) == REFUSED
    assert ledger.entries() == kept
    assert ledger.append("planned", {"n": 2}).seq == 2


def test_files_are_durable_before_their_names_and_names_before_the_pointer(start: Tiny) -> None:
    """Order, by recording calls: every fsync of content comes before the rename that shows it."""
    order: list[str] = []

    def note(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            order.append(f"{name} {Path(str(args[1])).name}" if name in ("rename", "replace") else name)
            return real(*args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
    try:
        for name, function in real.items():
            setattr(os, name, note(name, function))
        start.store.commit("e2")
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    moved, pointed = order.index("rename 000002-e2"), order.index("replace CURRENT")
    assert moved < pointed
    assert "fsync" in order[:moved]
    assert "fsync" in order[moved:pointed]
    assert order[pointed + 1] == "fsync"
