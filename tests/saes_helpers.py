"""Text to train autoencoders on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SENTENCES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains to train on and one that is held out whole; every document is unlike the others."""
    base = tmp_path_factory.mktemp("texts")
    (base / "held_out").mkdir()
    for name, path in (("places", base), ("code", base), ("unseen", base / "held_out")):
        documents = [
            " ".join(
                [f"{name} {i}:"] + [SENTENCES[(i * 7 + j * 3 + len(name)) % len(SENTENCES)] for j in range(4)]
            )
            for i in range(60)
        ]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (path / f"{name}.jsonl").write_text(lines)
    return base
