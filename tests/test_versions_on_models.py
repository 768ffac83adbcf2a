"""The store and the model room agree on what a model's bytes and digest are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guardedit.audit.export import export
from guardedit.audit.versions import VersionStore
from guardedit.models import sources
from guardedit.models.handle import ModelHandle


def _image(handle: ModelHandle, parameter: str, shift: float) -> bytes:
    """The parameter plus a shift, as raw bytes in its own dtype and orientation."""
    changed = (handle.model.get_parameter(parameter).detach() + shift).contiguous()
    return bytes(changed.view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_an_edit_exported_loads_as_the_committed_digest_and_undone_as_the_first(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    handle: ModelHandle = request.getfixturevalue(family)
    store = VersionStore(tmp_path / "home")
    store.import_base(handle.manifest(), handle.folder, handle.name)
    assert store.digest() == handle.digest()
    parameter = handle.rewrite_parameter(1)
    store.stage("e1", {parameter: _image(handle, parameter, 0.5)})
    committed = store.commit("e1").digest
    export(store, tmp_path / "edited")
    edited = sources.load(str(tmp_path / "edited"))
    assert edited.digest() == committed != handle.digest()
    moved = edited.model.get_parameter(parameter) - handle.model.get_parameter(parameter)
    assert torch.allclose(moved, torch.full_like(moved, 0.5), atol=1e-6)  # one float32 rounding
    assert store.roll_back("e1").digest == handle.digest()
    export(store, tmp_path / "undone")
    assert sources.load(str(tmp_path / "undone")).digest() == handle.digest()


@pytest.mark.slow
def test_the_default_model_is_guarded_byte_for_byte(default_handle: ModelHandle, tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "home")
    store.import_base(default_handle.manifest(), default_handle.folder, default_handle.name)
    assert store.verify().digest == default_handle.digest()
