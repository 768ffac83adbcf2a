"""Text for autoencoders: no document is in two splits, and text that is not there is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from saes_helpers import folder

from guardedit.errors import BadRequestError
from guardedit.saes import texts

__all__ = ["folder"]


def test_documents_keep_their_split_and_no_split_shares_one(folder: Path) -> None:
    files = texts.find_files([folder])
    parts = {
        split: texts.read_split(files, split, seed=5, held_out_share=0.3)
        for split in ("train", "calibrate", "test")
    }
    sets = {split: {text for group in found.values() for text in group} for split, found in parts.items()}
    assert not sets["train"] & sets["calibrate"]
    assert not sets["train"] & sets["test"]
    assert not sets["calibrate"] & sets["test"]
    assert "unseen" not in parts["train"]
    assert len(parts["test"]["unseen"]) == 60


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="nowhere"):
        texts.find_files([tmp_path / "nowhere"])
    with pytest.raises(BadRequestError, match=r"no \.txt"):
        texts.find_files([tmp_path])
