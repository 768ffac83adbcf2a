"""The checkpoints that ship: whole, small, readable by SAELens, and honest about what they reach."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from guardedit.models.handle import ModelHandle
from guardedit.saes import checkpoints
from guardedit.saes.grade import aims

SHIPPED = checkpoints.root() / "smollm2-135m"
FOLDERS = sorted(path.parent for path in SHIPPED.glob("*/digests.json"))


def test_four_hooks_are_watched_key_space_mlp_output_and_two_places_of_the_residual_stream() -> None:
    points = sorted(folder.name.split(".", 2)[2] for folder in FOLDERS)
    assert points == ["hook_mlp_out", "hook_resid_post", "hook_resid_post", "mlp.hook_post"]


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
