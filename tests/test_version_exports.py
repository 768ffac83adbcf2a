"""Which folders a store takes in, and what it gives out: the base with only the changed bytes replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import NAMES, Tiny, make_folder, make_store, tiny, tree, write_safetensors

from guardedit.audit.export import export
from guardedit.audit.safetensors_bytes import locate, read_folder, read_header, read_span
from guardedit.audit.versions import VersionStore
from guardedit.errors import (
    BadModelError,
    BadRequestError,
    IntegrityError,
    MissingModelError,
    StaleError,
    StorageError,
)
from guardedit.records import digest_of, digest_of_bytes

__all__ = ["tiny"]
A, B, C = NAMES[1:]


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
    written, base = tree(tmp_path / "out"), tree(tiny.folder)
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
