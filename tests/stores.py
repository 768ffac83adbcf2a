"""Small safetensors folders written byte by byte, and a version store on one: what the storage tests share."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from guardedit.audit.versions import VersionStore
from guardedit.records import digest_of_bytes

NAMES = ("embed.weight", "layers.0.down.weight", "layers.1.down.weight", "layers.2.down.weight")


def random_bytes(seed: int, n: int = 96) -> bytes:
    """Arbitrary bit patterns: as floats they hold NaNs with payloads, negative zeros and infinities."""
    return random.Random(seed).randbytes(n)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """name -> (dtype, shape, bytes); written without the library, so that the two check each other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    head = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)


@dataclass(frozen=True)
class Tiny:
    """A base folder and the store that guards it."""

    home: Path
    folder: Path
    manifest: dict[str, str]

    @property
    def store(self) -> VersionStore:
        """A fresh object, as another process would make one."""
        return VersionStore(self.home)

    def apply(self, edit_id: str, *parameters: str, seed: int = 0) -> str:
        """Stage and commit new random bytes for the named parameters; returns the digest afterwards."""
        images = {p: random_bytes(hash_of(edit_id, p) + seed) for p in parameters}
        self.store.stage(edit_id, images)
        return self.store.commit(edit_id).digest


def hash_of(*words: str) -> int:
    """A number that does not depend on PYTHONHASHSEED."""
    return int(digest_of_bytes("/".join(words).encode())[7:15], 16)


def make_folder(folder: Path, *, sharded: bool = False, prefix: str = "") -> dict[str, str]:
    """A base folder of four BF16, F16 and F32 tensors of 96 bytes; returns its manifest."""
    folder.mkdir(parents=True)
    dtypes = {0: ("F32", [6, 4]), 1: ("BF16", [6, 8]), 2: ("F16", [8, 6]), 3: ("F32", [24])}
    tensors = {name: (*dtypes[i], random_bytes(1000 + i)) for i, name in enumerate(NAMES)}
    stored = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if sharded:
        shards = {"model-00001-of-00002.safetensors": [0, 1], "model-00002-of-00002.safetensors": [2, 3]}
        names = list(stored)
        for file, which in shards.items():
            write_safetensors(folder / file, {names[i]: stored[names[i]] for i in which})
        weight_map = {names[i]: file for file, which in shards.items() for i in which}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        write_safetensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("a tiny model")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, unedited")
    return {name: digest_of_bytes(data) for name, (_, _, data) in tensors.items()}


def make_store(folder: Path, *, sharded: bool = False) -> Tiny:
    """A store under `folder`/home whose base is `folder`/base."""
    manifest = make_folder(folder / "base", sharded=sharded)
    tiny = Tiny(folder / "home", folder / "base", manifest)
    tiny.store.import_base(manifest, tiny.folder, "tiny")
    return tiny


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """A store that nothing was done to."""
    return make_store(tmp_path)
