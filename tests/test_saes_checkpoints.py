"""Checkpoints on disk: what is written is what is read, and no changed byte goes unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardedit.errors import IntegrityError, MissingStatisticsError, StatisticsMismatchError, StorageError
from guardedit.records import canonical, digest_of_bytes
from guardedit.saes import checkpoints, files
from guardedit.saes.cards import Labels, LatentLabel, QualityCard

HOOK = "blocks.2.mlp.hook_post"
ZERO = "sha256:" + "0" * 64


def card(d_in: int = 6, d_sae: int = 10) -> QualityCard:
    return QualityCard(
        hook_name=HOOK, model_name="tiny", d_in=d_in, d_sae=d_sae, data_digest=ZERO, mix={"all": 1.0}, tokens=1,
        samples=1, held_out_tokens=1, held_out_digest=ZERO, l0=2.0, explained_variance={"all": 0.5}, dead_share=0.0,
        dense_share=0.0, statistics_tokens=1, controls={}, threshold_rule="global", seed=0, created_with={},
        upstream_digest=ZERO,
    )  # fmt: skip


def tensors(d_in: int = 6, d_sae: int = 10) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half().float()

    weights = {
        "W_enc": draw(d_in, d_sae),
        "b_enc": draw(d_sae),
        "W_dec": draw(d_sae, d_in),
        "b_dec": draw(d_in),
    }
    stats = {"energy": draw(d_sae).abs(), "firing_rate": draw(d_sae).abs().clamp(max=1)}
    return {**weights, "threshold": draw(d_sae).abs()}, stats


def labels(d_sae: int = 10) -> Labels:
    return Labels(hook_name=HOOK, latents=tuple(LatentLabel(label=f"`{f}`") for f in range(d_sae)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "tiny" / HOOK
    checkpoints.save(target, *tensors(), card(), labels(), {"prepend_bos": False})
    return target


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    weights, stats = tensors()
    sae = checkpoints.load(folder, expect_hook=HOOK, expect_d_in=6, expect_upstream=ZERO)
    for name, tensor in {**weights, **stats}.items():
        assert torch.equal(getattr(sae, name), tensor), name
    assert sae.card == card()
    assert sae.labels == labels()
    assert sae.digest == checkpoints.load(folder).digest


def test_encode_is_jump_relu_with_the_fixed_thresholds(folder: Path) -> None:
    sae = checkpoints.load(folder)
    x = torch.randn(3, 4, sae.d_in, generator=torch.Generator().manual_seed(2))
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = pre * (pre > sae.threshold)
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(sae.reconstruct(x), expected @ sae.W_dec + sae.b_dec)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_an_integrity_error(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*checkpoints.FILES, "digests.json"]))
    path = folder / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) * 8 - 1))
    changed = bytearray(good)
    changed[at // 8] ^= 1 << (at % 8)
    path.write_bytes(changed)
    try:
        with pytest.raises(IntegrityError):
            checkpoints.load(folder)
    finally:
        path.write_bytes(good)
    checkpoints.load(folder)


@pytest.mark.parametrize("name", [*checkpoints.FILES, "digests.json"])
def test_a_missing_file_is_an_integrity_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "expected",
    [
        {"expect_hook": "blocks.3.mlp.hook_post"},
        {"expect_d_in": 7},
        {"expect_upstream": "sha256:" + "1" * 64},
    ],
)
def test_another_hook_width_or_model_than_expected_is_a_mismatch(
    folder: Path, expected: dict[str, object]
) -> None:
    with pytest.raises(StatisticsMismatchError, match="expected"):
        checkpoints.load(folder, **expected)  # type: ignore[arg-type]


def forge(folder: Path, name: str, data: bytes) -> None:
    """Change a file and repair the manifest: what a careless hand, not a disk, would leave."""
    (folder / name).write_bytes(data)
    manifest = {file: digest_of_bytes((folder / file).read_bytes()) for file in checkpoints.FILES}
    (folder / "digests.json").write_bytes(canonical(manifest))


def test_weights_of_another_width_are_a_mismatch_even_with_right_digests(folder: Path) -> None:
    from safetensors.torch import save

    forge(folder, "sae_weights.safetensors", save(tensors(d_in=7)[0]))
    with pytest.raises(StatisticsMismatchError, match=r"W_enc|W_dec|b_dec"):
        checkpoints.load(folder)


def test_an_architecture_without_fixed_thresholds_is_refused(folder: Path) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    forge(folder, "cfg.json", json.dumps({**config, "architecture": "topk"}).encode())
    with pytest.raises(StatisticsMismatchError, match="topk"):
        checkpoints.load(folder)


def test_weights_that_are_not_finite_are_refused_on_reading_and_on_writing(
    folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save

    weights, stats = tensors()
    broken = {**weights, "b_dec": torch.full((6,), 1e9)}
    with pytest.raises(IntegrityError, match="b_dec"):
        checkpoints.save(tmp_path / "other", broken, stats, card(), labels(), {})
    assert not (tmp_path / "other").exists()
    forge(folder, "sae_weights.safetensors", save({**weights, "b_dec": torch.full((6,), float("nan"))}))
    with pytest.raises(IntegrityError, match="not finite"):
        checkpoints.load(folder)


def test_a_checkpoint_whose_writing_was_cut_off_is_refused(folder: Path) -> None:
    (folder / "digests.json").unlink()
    with pytest.raises(IntegrityError):
        checkpoints.load(folder)


def test_all_checkpoints_of_a_model_are_found_by_hook(folder: Path) -> None:
    assert list(checkpoints.load_all("tiny", folder.parents[1])) == [HOOK]
    with pytest.raises(MissingStatisticsError, match="guardedit sae train"):
        checkpoints.load_all("unknown", folder.parents[1])


def test_a_folder_renamed_to_another_hook_is_a_mismatch(folder: Path) -> None:
    folder.rename(folder.parent / "blocks.9.mlp.hook_post")
    with pytest.raises(StatisticsMismatchError):
        checkpoints.load_all("tiny", folder.parents[1])


def test_reading_a_checkpoint_needs_neither_sae_lens_nor_transformers() -> None:
    code = (
        "import sys, guardedit.saes.checkpoints, guardedit.saes.command\n"
        "loaded = {'sae_lens', 'transformer_lens', 'transformers', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_card_can_be_read_without_torch() -> None:
    code = "import sys, guardedit.saes.cards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    files.write_atomically(tmp_path / "kept", b"old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        files.write_atomically(tmp_path / "kept", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"old"
