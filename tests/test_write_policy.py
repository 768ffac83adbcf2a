"""The policies that ship are what the bank of edits and the risk models give, and docs/limits.md shows them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import write_policy
from guardedit.pipeline.kit import kit_folder

PAGE = Path(__file__).parent.parent / "docs" / "limits.md"


POLICIES = ("policy.toml", "policies/strict.toml", "policies/permissive.toml")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """The kit that ships, without its policies."""
    folder = tmp_path / "smollm2-135m"
    shutil.copytree(kit_folder("smollm2-135m"), folder)
    for name in POLICIES:
        (folder / name).unlink()
    return folder


def written(kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["write_policy", str(kit)])
    write_policy.main()
    return capsys.readouterr().out


def test_the_shipped_policies_are_what_is_written(
    kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = kit_folder("smollm2-135m")
    told = written(kit, monkeypatch, capsys)
    for name in (*POLICIES, "kit.json"):
        assert (kit / name).read_bytes() == (shipped / name).read_bytes(), name
    assert told.strip() in PAGE.read_text("utf-8")
    assert told.count("\n| ") >= 30


def test_another_bank_gives_other_limits(
    kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = (kit_folder("smollm2-135m") / "policy.toml").read_text("utf-8")
    bank = kit / "preop_bank.json"
    values = bank.read_text("utf-8").replace(
        '"preop/latent_leak": [\n', '"preop/latent_leak": [\n900000.5,\n'
    )
    bank.write_text(values, "utf-8")
    told = written(kit, monkeypatch, capsys)
    changed = [line for line in told.splitlines() if line not in PAGE.read_text("utf-8")]
    assert [line.split("|")[1].strip() for line in changed[:1]] == ["latent-leak"]
    assert (kit / "policy.toml").read_text("utf-8") != shipped
