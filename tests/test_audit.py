"""An audit over a period: drawn from the record alone, the same every time, and every change of it is named."""

from __future__ import annotations

import re
from pathlib import Path

import builders
import pytest
from audit_helpers import EVIL, OPEN, Story, files, made, story, whole_story

from guardedit.audit import period_report, report
from guardedit.audit.period import PeriodAudit, audit_of
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.pipeline.auditing import audit, period_of, verify_file
from guardedit.records import canonical

__all__ = ["files", "made", "story"]

ROOT = Path(__file__).parent.parent


def test_equal_evidence_gives_equal_bytes_in_another_home_and_at_another_time(
    story: Story, made: PeriodAudit, tmp_path: Path
) -> None:
    again = audit(whole_story(tmp_path / "twin").workspace, OPEN)
    assert canonical(again.evidence) == canonical(made.evidence)
    assert again.evidence_digest == made.evidence_digest
    moved = audit_of(
        made.evidence, made.envelope.model_copy(update={"host": "elsewhere", "written": "later"})
    )
    one, other = (period_report.render(x, tmp_path / name) for x, name in ((made, "one"), (moved, "other")))
    for name in ("md", "html", "card"):
        assert getattr(one, name).read_bytes() == getattr(other, name).read_bytes()
    assert one.json.read_bytes() != other.json.read_bytes()


def test_the_story_is_told_whole(made: PeriodAudit) -> None:
    evidence = made.evidence
    assert {e.plan_id: e.state for e in evidence.edits} == {
        "0001-good": "committed", "0002-blocked": "blocked", "0003-waits": "needs-approval",
        "0004-over": "committed", "0005-harmful": "rolled-back", "0006-held": "held", "0007-crashed": "rolled-back",
    }  # fmt: skip
    assert [(o.plan_id, o.kind) for o in evidence.open] == [
        ("0003-waits", "waits-for-a-person"), ("0006-held", "held"),
    ]  # fmt: skip
    assert [(i.plan_id, i.kind) for i in evidence.incidents] == [
        ("0002-blocked", "blocked"), ("0005-harmful", "rolled-back-by-monitor"), ("0006-held", "held"),
        ("0007-crashed", "recovered"),
    ]  # fmt: skip
    assert [(o.plan_id, o.own_plan, o.stage) for o in evidence.overrides] == [("0004-over", True, "preop")]
    assert [d.plan_id for d in evidence.drift] == ["0001-good", "0004-over", "0005-harmful", "0006-held"]
    assert [f.plan_id for f in evidence.facts] == ["0001-good", "0004-over"]
    assert evidence.chain.untracked == 1 and [v.edit_id for v in evidence.versions] == [
        "0001-good",
        "0004-over",
    ]


def test_a_period_holds_its_entries_and_the_state_at_its_end(story: Story, made: PeriodAudit) -> None:
    entries = story.ledger.entries()
    decided = next(e for e in entries if e.kind == "decided")
    first = audit(story.workspace, period_of(None, decided.at)).evidence
    second = audit(story.workspace, period_of(decided.at, None)).evidence
    assert {e.plan_id: e.state for e in first.edits}["0004-over"] == "needs-approval"
    assert first.chain.closing == second.chain.opening and first.chain.last == decided.seq - 1
    assert [i.plan_id for i in (*first.incidents, *second.incidents)] == [
        i.plan_id for i in made.evidence.incidents
    ]
    assert "0003-waits" in [o.plan_id for o in second.open], "what waits from before still waits"
    nothing = audit(story.workspace, period_of("2031-01-01", None)).evidence
    assert (nothing.edits, nothing.incidents, nothing.chain.first) == ((), (), None)
    for wrong in (("soon", None), ("2026-02-01", "2026-01-01")):
        with pytest.raises(BadRequestError):
            period_of(*wrong)


def test_an_empty_home_gives_an_audit_too(tmp_path: Path) -> None:
    bare = Story(tmp_path)
    found = audit(bare.workspace, OPEN)
    files = period_report.render(found, tmp_path / "out")
    assert found.evidence.edits == () and "No edited fact is live" in files.md.read_text()
    assert verify_file(files.json, bare.workspace)["checked"][-1] == "seal"


def test_an_audit_is_refused_where_the_record_was_changed(tmp_path: Path) -> None:
    story = whole_story(tmp_path)
    plan = story.home / "plans" / "0004-over" / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b"Rome", b"Bonn"))
    with pytest.raises(IntegrityError, match="plan 0004-over"):
        audit(story.workspace, OPEN)
    other = whole_story(tmp_path / "other")
    other.tell("committed", "0006-held", event="commit")
    with pytest.raises(IntegrityError, match="0006-held"):
        audit(other.workspace, OPEN)


def test_text_of_a_request_stays_text_and_hides_nothing(files: period_report.RenderedAudit) -> None:
    page, text, card = (p.read_text(encoding="utf-8") for p in (files.html, files.md, files.card))
    assert not re.search(r"<(script|img|b)\b", page) and "&lt;script&gt;" in page
    for shown in (page, text):
        assert "⟨U+202E⟩" in shown and "⟨U+200B⟩" in shown and "⟨U+2060⟩" in shown and "⟨U+000A⟩" in shown
        assert not set(shown) & set("\u202e\u200b\u2060")
    assert not set(card) & set("\u202e\u200b\u2060")
    assert not re.search(r"(?<!\\)<(script|img)", text)
    assert EVIL.subject not in page and "Look twice" in page
    for block in re.findall(r"(?:^\|.*\n)+", text + card, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_the_card_tells_evil_facts_as_text(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.commit(story.plan("0001-evil", "auto-approved", requests=(EVIL,)), "embed.weight")
    card = period_report.render(audit(story.workspace, OPEN), tmp_path / "out").card.read_text()
    assert (
        "⟨U+202E⟩" in card and not re.search(r"(?<!\\)<(script|img|b)\b", card) and not card.startswith("# ")
    )
    rows = re.findall(r"^\|.*$", card, re.MULTILINE)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}


def test_the_page_is_small_loads_nothing_and_can_be_read_by_ear(files: period_report.RenderedAudit) -> None:
    page = files.html.read_text(encoding="utf-8")
    assert len(page.encode()) < 500_000 and '<html lang="en">' in page
    assert [len(re.findall(rf"<{tag}\b", page)) for tag in ("h1", "main", "header", "footer", "nav", "script")] == [
        1, 1, 1, 1, 1, 0,
    ]  # fmt: skip
    assert len(re.findall("<caption>", page)) == len(re.findall("<table>", page)) > 8
    assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", page))
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page.index('class="verdict') < page.index("<main"), "the verdict comes first"
    labels = re.findall(r'role="region" aria-label="([^"]+)"', page)
    assert not set(labels) & set(re.findall(r"<h2[^>]*>([^<]+)<", page)), "two landmarks of one name"


def test_what_a_report_supports_is_said_without_saying_that_it_complies(
    files: period_report.RenderedAudit,
) -> None:
    pages = [files.html.read_text(), report.html(report.sheet_of(builders.eiffel_committed()), "sha256:0")]
    for page in pages:
        part = page[page.index('id="supports"') :]
        for source in (
            "EU AI Act, Art. 12",
            "Annex IV",
            "NIST AI RMF, Measure",
            "Model card",
            "2 December 2027",
        ):
            assert source in part
        assert not re.search(r"compl(y|ies|iant|iance)", page, re.IGNORECASE)


def test_every_row_of_what_is_supported_finds_its_section() -> None:
    from guardedit.audit import supports

    table = report.sheet_of(builders.eiffel_committed()).sections[-1].tables[0]
    assert len(table.rows) == len(supports._EDIT)
