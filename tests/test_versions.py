"""Versions: undo is bit-identical and in order, what is live moves only by commit, and damage is seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from stores import NAMES, Tiny, make_folder, make_store, random_bytes, write_safetensors

from guardedit.audit.export import export
from guardedit.audit.safetensors_bytes import locate, read_folder, read_header, read_span
from guardedit.audit.versions import VersionStore
from guardedit.errors import (
    BadModelError,
    BadRequestError,
    IntegrityError,
    LockedError,
    MissingModelError,
    NotFoundError,
    OutOfOrderError,
    StaleError,
    StorageError,
)
from guardedit.records import digest_of, digest_of_bytes

A, B, C = NAMES[1:]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_store(tmp_path)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
    before = _tree(tiny.home / "model"), _tree(tiny.folder)
    staged = tiny.store.stage("e1", {A: random_bytes(1)})
    after = {
        name: data for name, data in _tree(tiny.home / "model").items() if not name.startswith("staged/")
    }
    assert (after, _tree(tiny.folder)) == before
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
    before = _tree(tiny.home / "model")
    tiny.store.stage("e1", {A: random_bytes(1)})
    assert tiny.store.drop_staged("e1")
    assert not tiny.store.drop_staged("e1")
    assert _tree(tiny.home / "model") == before


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
    before = _tree(tiny.home / "model")
    store = VersionStore(tiny.home, free=lambda _: 191)
    with pytest.raises(StorageError, match="191 bytes free, 192 are needed") as caught:
        store.stage("e1", {A: random_bytes(1)})
    assert caught.value.exit_code == 2
    assert _tree(tiny.home / "model") == before
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


def test_a_folder_that_does_not_hold_the_manifests_bytes_is_not_imported(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "base")
    wrong = manifest | {A: digest_of_bytes(b"something else")}
    with pytest.raises(IntegrityError, match=f"bytes of {A}"):
        VersionStore(tmp_path / "home").import_base(wrong, tmp_path / "base")
    with pytest.raises(BadModelError, match="in no safetensors file"):
        VersionStore(tmp_path / "home").import_base(manifest | {"ghost": manifest[A]}, tmp_path / "base")
    with pytest.raises(MissingModelError, match="not a folder"):
        VersionStore(tmp_path / "home").import_base(manifest, tmp_path / "nowhere")
    assert not (tmp_path / "home").exists()


def test_a_home_guards_one_model_whose_folder_may_move(tiny: Tiny, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other")
    tiny.apply("e1", A)
    tiny.folder.rename(tmp_path / "moved")
    with pytest.raises(MissingModelError, match="is gone"):
        tiny.store.read(B)
    tiny.store.import_base(tiny.manifest, tmp_path / "moved", "tiny")
    tiny.store.verify()
    with pytest.raises(StaleError, match="another --home"):
        tiny.store.import_base(other | {A: other[B]}, tmp_path / "other")


def test_another_tokenizer_makes_another_model(tiny: Tiny, tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text('{"version": "2.0"}')
    with pytest.raises(StaleError, match="other tokenizer"):
        tiny.store.import_base(manifest, tmp_path / "other", "tiny")


def test_parameters_are_found_where_the_files_leave_out_the_base_models_prefix(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"h.0.c_proj.weight": ("F32", [2], bytes(8))})
    spans = read_folder(tmp_path)
    assert locate("transformer.h.0.c_proj.weight", spans).name == "h.0.c_proj.weight"
    with pytest.raises(BadModelError):
        locate("transformer.h.1.c_proj.weight", spans)


@pytest.mark.parametrize("sharded", [False, True])
def test_an_export_is_the_base_with_only_the_changed_ranges_replaced(tmp_path: Path, sharded: bool) -> None:
    tiny = make_store(tmp_path, sharded=sharded)
    tiny.apply("e1", A, C)
    assert export(tiny.store, tmp_path / "out") == tiny.store.digest()
    written, base = _tree(tmp_path / "out"), _tree(tiny.folder)
    assert set(written) == set(base) - {"pytorch_model.bin"}
    spans = read_folder(tiny.folder)
    for name, data in written.items():
        expected = bytearray(base[name])
        for parameter in (A, C):
            if spans[parameter].file.name == name:
                start = spans[parameter].start
                expected[start : start + 96] = tiny.store.read(parameter).data
        assert data == bytes(expected)


def test_an_export_loads_with_safetensors_own_reader(tiny: Tiny, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tiny.apply("e1", A)
    export(tiny.store, tmp_path / "out")
    loaded = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert loaded[A].dtype == torch.bfloat16
    for name in NAMES:
        raw = tiny.store.read(name)
        assert tuple(loaded[name].shape) == raw.shape
        assert bytes(loaded[name].contiguous().view(torch.uint8).flatten().tolist()) == raw.data


def test_what_safetensors_writes_is_read_byte_for_byte(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16), "c": torch.randn(2, 2).half()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    for name, span in read_header(tmp_path / "model.safetensors").items():
        assert read_span(span) == bytes(tensors[name].contiguous().view(torch.uint8).flatten().tolist())
        assert span.shape == tuple(tensors[name].shape)


def test_an_older_version_can_be_exported_and_an_existing_folder_is_not_overwritten(
    tiny: Tiny, tmp_path: Path
) -> None:
    tiny.apply("e1", A)
    assert export(tiny.store, tmp_path / "base_again", "base") == digest_of(tiny.manifest)
    assert (tmp_path / "base_again" / "model.safetensors").read_bytes() == (
        tiny.folder / "model.safetensors"
    ).read_bytes()
    with pytest.raises(BadRequestError, match="not an empty folder"):
        export(tiny.store, tmp_path / "base_again")


def test_a_failed_export_leaves_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    tiny.apply("e1", A)
    with pytest.raises(StorageError, match="bytes free"):
        export(tiny.store, tmp_path / "out", free=lambda _: 10)
    weights = tiny.folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-97] + bytes([data[-97] ^ 1]) + data[-96:])
    with pytest.raises(IntegrityError):
        export(tiny.store, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "home"]


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin", 7, None]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, shard: object) -> None:
    import json

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BadModelError):
        read_folder(tmp_path)
