"""The checkpoints that ship: whole, small, readable by SAELens, and honest about what they reach."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from guardedit.drift.null import load_bank
from guardedit.editors.contextual import ContextualHparams, gate_hook
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.pipeline.kit import DRIFT_BANK, kit_folder, watched_hooks
from guardedit.saes import checkpoints
from guardedit.saes.grade import aims

SHIPPED = checkpoints.root() / "smollm2-135m"
FOLDERS = sorted(path.parent for path in SHIPPED.glob("*/digests.json"))


def test_key_space_mlp_output_and_three_places_of_the_residual_stream_have_one() -> None:
    points = sorted(folder.name.split(".", 2)[2] for folder in FOLDERS)
    assert points == ["hook_mlp_out", *["hook_resid_post"] * 3, "mlp.hook_post"]


def test_a_monitoring_reads_the_hooks_of_its_bank_and_gates_may_have_others() -> None:
    bank = load_bank(kit_folder("smollm2-135m") / DRIFT_BANK)
    names = [folder.name for folder in FOLDERS]
    watched = watched_hooks(names, bank.layer, bank)
    assert sorted(watched) == sorted(bank.hook_names) and set(names) - set(watched) == {
        key_hook(bank.layer), gate_hook_of_the_default(bank.layer)
    }  # fmt: skip
    every = set(names) - {key_hook(bank.layer)}
    assert set(watched_hooks(names, bank.layer, None)) == every
    gone = [name for name in names if name != bank.hook_names[0]]
    assert set(watched_hooks(gone, bank.layer, bank)) == every - {bank.hook_names[0]}, (
        "which the bank refuses"
    )


def gate_hook_of_the_default(layer: int) -> str:
    """Where the gates of the default model's 30 blocks read."""
    return gate_hook(SimpleNamespace(n_layers=30), ContextualHparams(layer=layer))  # type: ignore[arg-type]


def test_all_of_them_stay_under_sixty_megabytes() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 60e6
    assert all((folder / "labels.json").stat().st_size < 3e6 for folder in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.name))
def test_a_shipped_checkpoint_is_whole_and_sae_lens_computes_the_same(folder: Path) -> None:
    from sae_lens import SAE

    mine, theirs = checkpoints.load(folder, expect_hook=folder.name), SAE.load_from_disk(folder)
    x = mine.b_dec + 5 * torch.randn(16, mine.d_in, generator=torch.Generator().manual_seed(0))
    assert theirs.cfg.metadata.hook_name == mine.hook_name
    # float32 on both sides; only the order of the sums differs.
    torch.testing.assert_close(theirs(x).detach(), mine.reconstruct(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine.W_dec.norm(dim=-1), torch.ones(mine.d_sae), rtol=0, atol=2e-3)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.name))
def test_a_card_says_itself_which_aims_it_misses_and_beats_both_controls(folder: Path) -> None:
    card = checkpoints.load(folder).card
    assert card.aims == aims(card)
    assert card.explained_variance["all"] > 1.2 * max(card.controls["pca"], card.controls["frozen_decoder"])
    assert 28 <= card.l0 <= 36


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.name))
def test_nothing_in_a_checkpoint_names_a_machine_or_a_folder_of_it(folder: Path) -> None:
    for name in ("card.json", "cfg.json"):
        assert not re.search(r"/(home|root|tmp|work|Users)/", (folder / name).read_text())


@pytest.mark.slow
def test_the_shipped_checkpoints_belong_to_the_default_model(default_handle: ModelHandle) -> None:
    for name, sae in checkpoints.load_all("smollm2-135m").items():
        assert sae.card.upstream_digest == default_handle.hook_digest(name)
