"""docs/evidence.md is what its command makes of the committed tables."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import guard_evidence
from benchmarks.guard_evidence import fill

ROOT = Path(__file__).parent.parent


def test_figures_go_between_their_own_marks_and_nowhere_else() -> None:
    page = "words\n<!-- one -->\nold\n<!-- end -->\nmore words\n<!-- two -->\nkept\n<!-- end -->\n"
    found = fill(page, "one", "| 1\\1 |\n")
    assert found == page.replace("old\n", "| 1\\1 |\n")


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="'three'"):
        fill("<!-- one -->\n<!-- end -->\n", "three", "body\n")


@pytest.mark.slow
def test_the_committed_page_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, committed = tmp_path / "evidence.md", (ROOT / "docs" / "evidence.md").read_text("utf-8")
    bare = re.sub(r"(<!-- \w+ -->\n).*?(<!-- end -->)", r"\1\2", committed, flags=re.DOTALL)
    assert len(bare) < len(committed)
    page.write_text(bare, "utf-8")
    rows = ROOT / "docs" / "data" / "guard_rows.parquet"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["guard_evidence", "write", str(rows), "--to", str(page)])
    guard_evidence.main()
    assert page.read_text("utf-8") == committed
    assert (tmp_path / "images" / "guard_rome.svg").read_bytes() == (
        ROOT / "docs" / "images" / "guard_rome.svg"
    ).read_bytes()
