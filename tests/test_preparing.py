"""Statistics of several layers join one kit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SENTENCES

from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.second_moment import SecondMoment
from guardedit.pipeline.kit import KIT_FILE, read_kit, write_kit
from guardedit.pipeline.preparing import collect_statistics


def test_a_band_adds_a_layer_and_leaves_the_kit_at_its_own(
    tiny_llama: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDEDIT_CACHE", str(tmp_path / "cache"))
    texts, kit = tmp_path / "texts.jsonl", tmp_path / "kit"
    texts.write_text("\n".join(json.dumps({"text": " ".join(SENTENCES)}) for _ in range(4)))
    with pytest.raises(BadRequestError, match="no kit"):
        collect_statistics(tiny_llama, 2, [texts], 400, out=kit, band=True)
    collect_statistics(tiny_llama, 2, [texts], 400, out=kit)
    assert read_kit(kit / KIT_FILE)["layer"] == 2
    write_kit(kit, layer=2, hparams={"memit": {"layers": [1, 2]}})
    collect_statistics(tiny_llama, 1, [texts], 400, out=kit, band=True)
    plain = read_kit(kit / KIT_FILE)
    assert plain["layer"] == 2 and plain["hparams"] == {"memit": {"layers": [1, 2]}}
    found = {SecondMoment.load(kit / name, tiny_llama).hook_name for name in plain["second_moments"]}
    assert found == {key_hook(1), key_hook(2)}
    collect_statistics(tiny_llama, 1, [texts], 400, out=kit)
    assert read_kit(kit / KIT_FILE)["layer"] == 1
