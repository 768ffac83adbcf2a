"""Ten edits in a row on the default model: each undone in order to the digest before it, nothing collected anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lineage_helpers import chained, counted

import guardedit
from guardedit.config import cache_folder
from guardedit.drift import sides
from guardedit.errors import OutOfOrderError
from guardedit.models import statistics
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import WHEELS
from guardedit.pipeline import monitoring
from guardedit.pipeline.kit import kit_folder
from guardedit.records import EditRequest
from guardedit.risk import banks
from guardedit.risk.neighbours import ProbeSizes
from guardedit.saes import checkpoints

LENIENT = """
version = 1
name = "ten in a row"

[[rule]]
id = "norm"
metric = "preop/delta_norm_ratio"
op = "<="
limit = 10.0
level = "soft"
sentence = "The update has {value} times the norm of the weight."

[[rule]]
id = "sum"
metric = "postop/lineage_far_kl"
op = "<="
limit = 10.0
level = "hard"
sentence = "All edits together moved unrelated text by {value} nats."

[[rule]]
id = "far"
metric = "postop/far_kl"
op = "<="
limit = 10.0
level = "hard"
sentence = "Unrelated text moved by {value} nats."
"""
"""Limits that hold: what edits do is judged elsewhere, here it is what ten of them leave behind."""
CAPITALS = {
    "France": "Rome", "Germany": "Madrid", "Italy": "London", "Spain": "Cairo", "Portugal": "Tokyo",
    "England": "Athens", "Russia": "Lisbon", "Austria": "Moscow", "Greece": "Berlin", "Japan": "Vienna",
}  # fmt: skip


def made(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file below a folder, with its inode and the time at which it was written."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


def texts_read(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the texts that reference sides read from here on."""
    names: list[str] = []
    original = sides._reference

    def reading(handle: Any, rows: Any, *more: Any) -> Any:
        names.append(rows.name)
        return original(handle, rows, *more)

    patch.setattr(sides, "_reference", reading)
    return names


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_edits_of_the_default_model_collect_nothing_anew_and_are_undone_in_order(
    default_handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(LENIENT, encoding="utf-8")
    monkeypatch.setattr(monitoring, "FAR_TOKENS", 512)
    monkeypatch.setattr(monitoring, "MONITOR_SIZES", ProbeSizes(subject=8, near=8, entailed=1, target=1))
    monkeypatch.setattr(monitoring, "drift_cache", lambda: tmp_path / "drift")
    guard = guardedit.open(next(iter(WHEELS)), home=tmp_path / "home", policy=policy)
    requests = [
        EditRequest(subject=subject, prompt="The capital of {} is the city of", target_new=new)
        for subject, new in CAPITALS.items()
    ]
    plans = [guard.plan(requests[0], hparams={"steps": 8})]
    audits = [guard.apply(plans[0].plan_id)]
    folders = [kit_folder(guard.handle.name), checkpoints.root(), cache_folder() / "banks"]
    found = [made(folder) for folder in folders]
    base_far = {path: inode for path, (inode, _) in made(tmp_path / "drift").items()}
    gathered = [counted(monkeypatch, statistics, "collect"), counted(monkeypatch, banks, "_text_keys")]
    read = texts_read(monkeypatch)
    for request in requests[1:]:
        plans.append(guard.plan(request, hparams={"steps": 8}))
        audits.append(guard.apply(plans[-1].plan_id))
    assert gathered == [[], []]
    # Others may add to the user's cache meanwhile; what was there is not written again.
    assert [
        {path: now[path] for path in known} for now, known in zip(map(made, folders), found, strict=True)
    ] == found
    # The base's far side was written once and is read ever since; each later version's is computed as it comes.
    assert len(base_far) == 1 and all(path.stat().st_ino == inode for path, inode in base_far.items())
    assert read.count("far") == len(requests) - 1
    chained(plans, audits)
    with pytest.raises(OutOfOrderError, match=plans[9].plan_id) as refused:
        guard.rollback(plans[4].plan_id)
    assert refused.value.exit_code == 8
    for plan in reversed(plans):
        assert guard.rollback(plan.plan_id).digest_after == plan.model_digest
    assert guard.handle.digest() == default_handle.digest() == plans[0].model_digest
    assert guard.verify()["versions"] == 20
