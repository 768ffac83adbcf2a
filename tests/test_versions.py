"""Versions: undo is bit-identical and in order, what is live moves only by commit, and damage is seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from stores import NAMES, Tiny, make_store, random_bytes, tiny, tree

from guardedit.audit.versions import VersionStore
from guardedit.errors import (
    BadRequestError,
    IntegrityError,
    LockedError,
    NotFoundError,
    OutOfOrderError,
    StaleError,
    StorageError,
)
from guardedit.records import digest_of, digest_of_bytes

__all__ = ["tiny"]
A, B, C = NAMES[1:]


def test_the_digest_of_a_fresh_store_is_that_of_the_models_manifest(tiny: Tiny) -> None:
    assert tiny.store.digest() == digest_of(tiny.manifest)
    assert tiny.store.manifest() == tiny.manifest
    assert tiny.store.live_overrides() == {}


def test_making_a_store_and_asking_an_empty_one_writes_nothing(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "home")
    with pytest.raises(NotFoundError, match="guards no model yet"):
        store.digest()
    assert not store.exists
    assert not (tmp_path / "home").exists()


def test_staging_leaves_every_live_byte_alone(tiny: Tiny) -> None:
    before = tree(tiny.home / "model"), tree(tiny.folder)
    staged = tiny.store.stage("e1", {A: random_bytes(1)})
    after = {name: data for name, data in tree(tiny.home / "model").items() if not name.startswith("staged/")}
    assert (after, tree(tiny.folder)) == before
    assert tiny.store.digest() == digest_of(tiny.manifest)
    assert staged.overrides[A].read_bytes() == random_bytes(1)
    assert staged.digest == digest_of(tiny.manifest | {A: digest_of_bytes(random_bytes(1))})


def test_commit_makes_exactly_the_staged_digest_live(tiny: Tiny) -> None:
    staged = tiny.store.stage("e1", {A: random_bytes(1)})
    tiny.store.commit("e1")
    assert tiny.store.digest() == staged.digest
    assert tiny.store.read(A).data == random_bytes(1)
    assert tiny.store.read(B).digest == tiny.manifest[B]
    assert tiny.store.staged_ids() == ()


def test_a_tensor_keeps_its_dtype_and_shape_through_an_edit(tiny: Tiny) -> None:
    tiny.apply("e1", B)
    raw = tiny.store.read(B)
    assert (raw.dtype, raw.shape) == ("F16", (8, 6))


def test_undoing_ten_edits_in_order_restores_every_earlier_digest(tiny: Tiny) -> None:
    digests = [tiny.store.digest()]
    for i in range(10):
        digests.append(tiny.apply(f"e{i}", A))
    assert len(set(digests)) == 11
    for i in reversed(range(10)):
        assert tiny.store.roll_back(f"e{i}").digest == digests[i]
        assert tiny.store.digest() == digests[i]
    assert tiny.store.live_overrides() == {}
    assert tiny.store.lineage().generation == 20


def test_history_stays_after_an_undo(tiny: Tiny) -> None:
    tiny.apply("e1", A)
    tiny.store.roll_back("e1")
    assert [(v.action, v.edit_id) for v in tiny.store.lineage().versions] == [
        ("edit", "e1"),
        ("roll-back", "e1"),
    ]
    assert tiny.store.read(A, "e1").data != tiny.store.read(A).data


def test_undo_out_of_order_on_one_tensor_is_refused_and_names_what_goes_first(tiny: Tiny) -> None:
    tiny.apply("e1", A)
    tiny.apply("e2", A, B)
    tiny.apply("e3", B)
    before = tiny.store.digest()
    with pytest.raises(OutOfOrderError, match="undo e2 first") as caught:
        tiny.store.roll_back("e1")
    assert caught.value.exit_code == 8
    assert tiny.store.digest() == before


def test_edits_of_different_tensors_may_be_undone_in_any_order(tiny: Tiny) -> None:
    tiny.apply("e1", A)
    tiny.apply("e2", B)
    tiny.store.roll_back("e1")
    assert tiny.store.manifest() == tiny.manifest | {B: tiny.store.read(B, "e2").digest}


@pytest.mark.parametrize("seed", range(8))
def test_any_legal_order_of_edits_and_undos_ends_where_the_model_says(tmp_path: Path, seed: int) -> None:
    """Against a model of a few lines: per tensor a stack of images, an undo pops the edit's images."""
    tiny, chance = make_store(tmp_path), random.Random(seed)
    base = {name: tiny.store.read(name).data for name in NAMES}
    standing: list[tuple[str, dict[str, bytes]]] = []
    for step in range(14):
        blocked = [
            i for i, (_, x) in enumerate(standing) if any(set(x) & set(y) for _, y in standing[i + 1 :])
        ]
        free = [i for i in range(len(standing)) if i not in blocked]
        if free and chance.random() < 0.45:
            name, _ = standing.pop(chance.choice(free))
            tiny.store.roll_back(name)
        else:
            images = {p: chance.randbytes(96) for p in chance.sample(NAMES, chance.randint(1, 2))}
            tiny.store.stage(f"e{step}", images)
            tiny.store.commit(f"e{step}")
            standing.append((f"e{step}", images))
        expected = dict(base)
        for _, images in standing:
            expected |= images
        assert {name: tiny.store.read(name).data for name in NAMES} == expected
    assert tiny.store.verify().digest == digest_of({n: digest_of_bytes(d) for n, d in expected.items()})


def test_an_edit_is_undone_once_and_only_if_it_was_committed(tiny: Tiny) -> None:
    with pytest.raises(NotFoundError, match="never committed"):
        tiny.store.roll_back("e1")
    tiny.apply("e1", A)
    tiny.store.roll_back("e1")
    with pytest.raises(StaleError, match="rolled back before"):
        tiny.store.roll_back("e1")
    with pytest.raises(StaleError, match="committed before"):
        tiny.store.stage("e1", {A: random_bytes(1)})


def test_an_edit_staged_on_a_model_that_has_moved_on_is_stale(tiny: Tiny) -> None:
    tiny.store.stage("slow", {A: random_bytes(1)})
    now = tiny.apply("quick", B)
    with pytest.raises(StaleError, match="plan again"):
        tiny.store.commit("slow")
    assert tiny.store.digest() == now


def test_staging_again_replaces_what_was_staged(tiny: Tiny) -> None:
    tiny.store.stage("e1", {A: random_bytes(1)})
    tiny.store.stage("e1", {A: random_bytes(2)})
    tiny.store.commit("e1")
    assert tiny.store.read(A).data == random_bytes(2)


def test_dropping_a_staged_edit_leaves_no_trace(tiny: Tiny) -> None:
    before = tree(tiny.home / "model")
    tiny.store.stage("e1", {A: random_bytes(1)})
    assert tiny.store.drop_staged("e1")
    assert not tiny.store.drop_staged("e1")
    assert tree(tiny.home / "model") == before


def test_bytes_that_are_not_those_planned_are_refused(tiny: Tiny) -> None:
    with pytest.raises(IntegrityError, match="not the tensor that was planned"):
        tiny.store.stage("e1", {A: random_bytes(1)}, expected={A: digest_of_bytes(random_bytes(2))})
    with pytest.raises(IntegrityError, match="the plan changes"):
        tiny.store.stage("e1", {A: random_bytes(1)}, expected={B: digest_of_bytes(random_bytes(1))})
    assert tiny.store.staged_ids() == ()


@pytest.mark.parametrize("edit_id", ["", "../e1", "E1", ".hidden", "a/b", "x" * 65, "e1\n"])
def test_an_id_that_could_leave_its_folder_is_refused(tiny: Tiny, edit_id: str) -> None:
    for verb in (
        lambda: tiny.store.stage(edit_id, {A: random_bytes(1)}),
        lambda: tiny.store.roll_back(edit_id),
    ):
        with pytest.raises(BadRequestError, match="edit id"):
            verb()


def test_wrong_parameters_and_sizes_are_refused(tiny: Tiny) -> None:
    with pytest.raises(NotFoundError, match="no parameter"):
        tiny.store.stage("e1", {"layers.9.down.weight": random_bytes(1)})
    with pytest.raises(BadRequestError, match="has 96 bytes as BF16, got 95"):
        tiny.store.stage("e1", {A: random_bytes(1, 95)})
    with pytest.raises(BadRequestError, match="changes no tensor"):
        tiny.store.stage("e1", {})


def test_too_little_space_names_needed_and_free_and_leaves_everything_alone(tiny: Tiny) -> None:
    before = tree(tiny.home / "model")
    store = VersionStore(tiny.home, free=lambda _: 191)
    with pytest.raises(StorageError, match="191 bytes free, 192 are needed") as caught:
        store.stage("e1", {A: random_bytes(1)})
    assert caught.value.exit_code == 2
    assert tree(tiny.home / "model") == before
    VersionStore(tiny.home, free=lambda _: 192).stage("e1", {A: random_bytes(1)})


def test_a_second_editor_is_locked_out_and_told_who_is_in(tiny: Tiny) -> None:
    import os

    with tiny.store.lock():
        with pytest.raises(LockedError, match=f"process {os.getpid()}") as caught:
            tiny.store.stage("e1", {A: random_bytes(1)})
        assert caught.value.exit_code == 7
    tiny.store.stage("e1", {A: random_bytes(1)})
    assert not (tiny.home / "lock.owner.json").exists()


def test_the_lock_is_reentrant_and_held_to_the_end_of_the_outer_block(tiny: Tiny) -> None:
    store = tiny.store
    with store.lock():
        store.stage("e1", {A: random_bytes(1)})
        with pytest.raises(LockedError):
            tiny.store.commit("e1")
        store.commit("e1")
