"""The audit report: one record, three prints that agree, nothing left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import builders
import pytest
from builder_parts import digest
from report_helpers import REPORTS, Page, markdown_of, page_of, pages

from guardedit.audit import report
from guardedit.audit.words import number, percent, quantity
from guardedit.errors import StorageError
from guardedit.records import AuditReport

__all__ = ["pages"]


def test_the_record_reads_back_from_report_json(tmp_path: Path) -> None:
    for audit in REPORTS:
        made = report.render(audit, tmp_path / audit.edit_id)
        assert AuditReport.model_validate_json(made.json.read_bytes()) == audit.sealed()
        assert {p.name for p in made.json.parent.iterdir()} == {"report.json", "report.md", "report.html"}


def test_one_record_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    made = report.render(builders.eiffel_committed(), tmp_path / "here")
    code = (
        "import sys, pathlib, builders; from guardedit.audit.report import render\n"
        "render(builders.eiffel_committed(), pathlib.Path(sys.argv[1]))\n"
        "assert not {'matplotlib.pyplot', 'mlflow', 'torch'} & set(sys.modules)"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    for path in (made.json, made.md, made.html):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_a_scores_remark_and_name_stand_below_it(pages: dict[str, str]) -> None:
    for page in pages.values():
        over, under = (re.findall(rf'<tr class="{which}"', page) for which in ("over", "under"))
        assert len(over) == len(under) > 0
        assert '<span class="label">Name:</span> <code>leakage</code>' in page


def test_a_blocked_edit_says_what_is_missing_in_words() -> None:
    text = Page(page_of(builders.france_blocked())).text
    assert "No staged copy was made" in text
    assert "none was made" in text
    assert "nothing to undo" in text
    assert "MLflow could not be reached" in text


def test_the_first_lines_tell_verdict_request_and_harm() -> None:
    text = Page(page_of(builders.france_blocked())).text
    opening = text[text.index("Audit report of one edit") :][:1500]
    for words in (
        "France: Paris → Marseille",
        "Blocked",
        "After “The capital of France is …”, the model shall say “Marseille” instead of “Paris”.",
        "10 of 24 questions about other subjects of the same kind would get another answer",
        "“Brussels” would become “Marseille”",
        "Broken: ",
    ):
        assert words in opening, words


def test_the_broken_limits_come_first_and_none_is_left_out() -> None:
    audit = builders.finetune_rolled_back()
    limits = [t for s in report.sheet_of(audit).sections for t in s.tables if t.caption.startswith("Limits")]
    assert audit.postop is not None
    assert [len(t.rows) for t in limits] == [len(audit.plan.judgement.findings), len(audit.postop.findings)]
    words = [row[0].word for row in limits[0].rows]  # type: ignore[union-attr]
    assert words[:2] == ["broken, waived", "broken, noted"] and set(words[2:]) == {"kept"}


def test_an_unjudged_limit_never_reads_as_kept() -> None:
    sheet = report.sheet_of(builders.eiffel_waiting())
    rows = next(t for s in sheet.sections for t in s.tables if t.caption == "Limits before the write").rows
    unknown = [row for row in rows if "latent_leak" in getattr(row[-1], "text", "")]
    assert [(row[0].word, row[2]) for row in unknown] == [("cannot tell", "not measured")]  # type: ignore[union-attr]
    assert any("Cannot be judged" in line for line in sheet.story.decided)


def test_an_undone_edit_is_told_apart_from_one_that_did_harm_or_was_never_judged() -> None:
    passed = builders.eiffel_committed().model_copy(
        update={"outcome": "rolled-back", "digest_after": digest("base")}
    )
    harmed = builders.finetune_rolled_back()
    unknown = harmed.model_copy(
        update={"postop": harmed.postop.model_copy(update={"verdict": "inconclusive"})}
    )  # type: ignore[union-attr]
    crashed = harmed.model_copy(update={"postop": None})
    stories = [report.sheet_of(a).story for a in (passed, harmed, unknown, crashed)]
    assert len({s.headline for s in stories}) == 4
    assert stories[0].sign.word == "Undone on request"
    assert "harm" in stories[1].headline and "harm" not in stories[3].headline


def test_a_live_version_that_is_neither_is_pointed_out() -> None:
    moved = builders.france_blocked().model_copy(update={"digest_after": digest("other")})
    assert any("another version" in w for w in report.sheet_of(moved).story.warnings)
    assert not report.sheet_of(builders.france_blocked()).story.warnings


def test_a_decision_about_another_plan_is_not_taken_for_one_about_this() -> None:
    audit = builders.eiffel_committed()
    assert audit.decision is not None
    strange = audit.decision.model_copy(update={"plan_digest": digest("another plan")})
    text = Page(page_of(audit.model_copy(update={"decision": strange}))).text
    assert "it does not cover this plan" in text
    assert "it does not cover this plan" not in Page(page_of(audit)).text


def test_markdown_has_one_row_a_line_and_the_same_numbers_as_the_page() -> None:
    audit = builders.eiffel_committed()
    shown, page = markdown_of(audit), Page(page_of(audit)).text
    cells = [
        c for line in shown.splitlines() if line.startswith("| ") for c in re.split(r"(?<!\\)\|", line)[1:-1]
    ]
    numbers = [c.strip() for c in cells if re.fullmatch(r"\s*[\d.,×⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+( %| nats)?\s*", c)]
    assert len(numbers) > 60 and all(n in page for n in numbers)
    assert all(line.count("\n") == 0 for line in shown.split("\n"))


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.123456, "nats", "0.1235 nats"),
        (0.0000123456, "ratio", "1.235×10⁻⁵"),
        (0.5, "share", "50 %"),
        (3.0, "count", "3"),
        (None, "nats", "not measured"),
        (float("nan"), "nats", "not measured"),
        (float("inf"), "share", "not measured"),
    ],
)
def test_numbers_have_four_digits_and_a_missing_one_is_said(
    value: float | None, unit: str, expected: str
) -> None:
    assert quantity(value, unit) == expected
    assert number(value) != "nan" and percent(0.25) == "25 %"


def test_the_list_of_reports_names_all_and_hides_no_broken_one(tmp_path: Path) -> None:
    for audit in REPORTS:
        report.render(audit, tmp_path / audit.edit_id)
    (tmp_path / REPORTS[0].edit_id / "report.json").write_text("{}")
    entries = report.find_reports(tmp_path)
    page = Page(report.render_index(entries, tmp_path).read_text())
    assert len(entries) == len(REPORTS)
    assert [e.created for e in entries[:-1]] == sorted((e.created for e in entries[:-1]), reverse=True)
    assert "Cannot be read" in page.text
    links = [a["href"] or "" for a in page.all("a")[1:]]
    assert sorted(links) == sorted(f"./{a.edit_id}/report.html" for a in REPORTS)
    assert all((tmp_path / link).is_file() for link in links)


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        report.render(builders.france_blocked(), tmp_path / "file" / "reports")
