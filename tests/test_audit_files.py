"""Report files checked by themselves and against their ledger: whatever was changed is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import builders
import pytest
from audit_helpers import OPEN, Story, files, made, story, whole_story
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_helpers import Home, home, request_of, run, world

from guardedit.audit import period_report, report
from guardedit.audit.checking import check_digests, read_report
from guardedit.audit.period import PeriodAudit, audit_of
from guardedit.audit.schemas import KINDS, schema_text
from guardedit.errors import GuardeditError, IntegrityError
from guardedit.pipeline.auditing import audit, verify_file
from guardedit.records import AuditReport, canonical

__all__ = ["files", "home", "made", "story", "world"]

ROOT = Path(__file__).parent.parent


def test_an_unchanged_file_is_borne_out_and_stays_so_when_the_ledger_grows(tmp_path: Path) -> None:
    story = whole_story(tmp_path / "s")
    files = period_report.render(audit(story.workspace, OPEN), tmp_path / "out")
    assert verify_file(files.json, story.workspace)["not_in_the_ledger"] == ["envelope"]
    story.plan("0008-later", "needs-approval")
    story.tiny.store.roll_back("0004-over")
    story.tell("rolled-back", "0004-over", event="roll-back", undone=True, by="somebody", reason="asked for")
    assert "ledger" in verify_file(files.json, story.workspace)["checked"]


CHANGES: list[tuple[str, Any]] = [
    ("edits.3.decisions.0.approver", "nobody"), ("edits.0.requests.0.target_new", " Berlin"),
    ("edits.1.state", "committed"), ("incidents.2.kind", "stale"), ("drift.0.value", 0.0), ("open", []),
    ("model", "another"), ("chain.untracked", 0), ("versions.1.digest", "sha256:" + "1" * 64),
    ("chain.head_digest", "sha256:" + "2" * 64), ("facts.0.p_new_after", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value"), CHANGES)
def test_a_forged_field_is_named_although_all_digests_were_made_to_fit(
    story: Story, made: PeriodAudit, tmp_path: Path, where: str, value: Any
) -> None:
    plain = json.loads(canonical(made.evidence))
    *steps, last = [int(s) if s.isdigit() else s for s in where.split(".")]
    place = plain
    for step in steps:
        place = place[step]
    place[last] = value
    forged = audit_of(type(made.evidence).model_validate_json(json.dumps(plain)), made.envelope)
    files = period_report.render(forged, tmp_path)
    verify_file(files.json, None)
    with pytest.raises(IntegrityError) as caught:
        verify_file(files.json, story.workspace)
    words = re.findall(r"[a-z_]+", where)
    named = "head_seq" if last == "head_digest" else words[-1]
    assert (named in str(caught.value) and words[0] in str(caught.value)) or where == "open"


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_changed_byte_is_refused_with_the_files_name(
    files: period_report.RenderedAudit, where: float, bits: int
) -> None:
    edit = report.render(builders.eiffel_committed(), files.json.parent)
    for path in (files.json, edit.json):
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= bits
        changed = path.with_name(f"changed-{path.name}")
        changed.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"changed-(audit|report)\.json|plan|seal"):
            verify_file(changed, None)


def test_a_files_seal_and_form_are_looked_at(made: PeriodAudit, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    envelope = made.envelope.model_copy(update={"host": "another"})
    cases = {
        "envelope": made.model_copy(update={"envelope": envelope}),
        "evidence": made.model_copy(update={"evidence": made.evidence.model_copy(update={"open": ()})}),
        "seal": made.model_copy(update={"seal": None}),
    }
    for word, changed in cases.items():
        path.write_bytes(canonical(changed))
        with pytest.raises(IntegrityError, match=f"^{word}"):
            check_digests(read_report(path), "audit.json")
    for spoilt in (
        canonical(made) + b"\n",
        canonical(made).replace(b'"open":', b'"open": ', 1),
        b"{",
        b"[]",
        b"{}",
    ):
        path.write_bytes(spoilt)
        with pytest.raises(IntegrityError, match=r"audit\.json"):
            read_report(path)


@pytest.mark.parametrize("plan_id", ["0001-good", "0004-over", "0005-harmful", "0006-held", "0007-crashed"])
def test_a_report_is_borne_out_by_its_ledger_and_a_forged_one_is_not(
    story: Story, tmp_path: Path, plan_id: str
) -> None:
    honest = story.report(plan_id)
    path = report.render(honest, tmp_path).json
    assert verify_file(path, story.workspace)["checked"] == [
        "schema",
        "form",
        "ledger",
        "plan_digest",
        "seal",
    ]
    forgeries: dict[str, dict[str, Any]] = {
        "outcome": {"outcome": "stale"},
        "created": {"created": "2020-01-01T00:00:00+00:00"},
        "edit_id": {"edit_id": "0099-other"},
        "digest_after": {"digest_after": "sha256:" + "3" * 64},
        "target_probabilities": {"target_probabilities": {"new_after": 1.0}},
    }
    for field, change in forgeries.items():
        report.render(honest.model_copy(update=change), tmp_path)
        with pytest.raises(IntegrityError, match=f"^{field}"):
            verify_file(path, story.workspace)


def test_a_report_without_a_seal_is_refused_alone_and_borne_out_by_its_ledger(
    story: Story, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(report.pretty(story.report("0001-good")))
    assert "seal" not in verify_file(path, story.workspace)["checked"]
    with pytest.raises(IntegrityError, match=r"^seal"):
        verify_file(path, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_schema_is_current(kind: str) -> None:
    published = ROOT / "docs" / "schema" / f"{kind}.schema.json"
    assert published.read_text(encoding="utf-8") == schema_text(kind), (
        f"run: guardedit schema {kind} > {published}"
    )


def test_real_reports_fit_the_published_schema(files: period_report.RenderedAudit) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checks = {k: jsonschema.Draft202012Validator(json.loads(schema_text(k))) for k in KINDS}
    checks["audit"].validate(json.loads(files.json.read_bytes()))
    for one in builders.everything():
        checks["report"].validate(json.loads(report.record_json(one)))
    examples = sorted((ROOT / "reports" / "example").glob("*/report.json"))
    assert examples
    for path in examples:
        checks["report"].validate(json.loads(path.read_bytes()))
        check_digests(read_report(path), path.name)
    spoilt = {**json.loads(files.json.read_bytes()), "more": 1}
    assert not checks["audit"].is_valid(spoilt)


def test_a_record_in_no_file_has_no_seal_and_its_digest_is_what_it_was() -> None:
    one = builders.eiffel_committed()
    assert "seal" not in one.model_dump(mode="json")
    assert AuditReport.model_validate_json(report.record_json(one)).model_copy(update={"seal": None}) == one


def test_a_pdf_names_what_it_needs_or_is_one(
    files: period_report.RenderedAudit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardedit.audit import pdf

    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "weasyprint", None)
        with pytest.raises(GuardeditError, match=r"guardedit\[pdf\]"):
            pdf.load_printer()
    pytest.importorskip("weasyprint", exc_type=ImportError)
    made = pdf.write_pdf(files.html, files.html.with_suffix(".pdf"), pdf.load_printer())
    assert made.read_bytes().startswith(b"%PDF-")


def test_the_commands_of_an_auditor(story: Story, tmp_path: Path) -> None:
    front = ("--home", str(story.home))
    drawn = run(*front, "--json", "audit", "--out", str(tmp_path / "q4"))
    assert drawn.code == 0, drawn.err
    path = Path(drawn.json["files"]["json"])
    assert drawn.json["open"] == ["0003-waits", "0006-held"] and path.name == "audit.json"
    assert run(*front, "verify", str(path)).code == 0
    assert "no ledger was asked" in run(*front, "verify", str(path), "--alone").out
    assert run("--home", str(tmp_path / "nowhere"), "verify", str(path)).code == 2
    assert run(*front, "verify", "--alone").code == 2
    path.write_bytes(path.read_bytes().replace(b"0005-harmful", b"0005-harmles"))
    refused = run(*front, "verify", str(path))
    assert refused.code == 6 and "plan_id" in refused.err and "0005-harmles" in refused.err
    assert run(*front, "audit", "--since", "soon").code == 2
    assert json.loads(run("schema", "audit").out)["title"].startswith("guardedit")


def test_a_real_edit_is_audited_from_plan_to_undo(home: Home, tmp_path: Path) -> None:
    plan_id = home.run("--json", "plan", str(home.requests(request_of().model_dump(exclude_none=True)))).json[
        "plans"
    ][0]["plan_id"]
    where = ("--reports", str(tmp_path / "reports"))
    assert home.run("apply", plan_id, *where).code == 0
    path = tmp_path / "reports" / plan_id / "report.json"
    early = tmp_path / "early.json"
    early.write_bytes(path.read_bytes())
    assert home.run("audit", "--out", str(tmp_path / "one")).code == 0
    assert home.run("rollback", plan_id, *where).code == 0
    assert home.run("audit", "--out", str(tmp_path / "two")).code == 0
    for file in (path, early, tmp_path / "one" / "audit.json", tmp_path / "two" / "audit.json"):
        ran = home.run("--json", "verify", str(file))
        assert ran.code == 0 and "ledger" in ran.json["checked"], ran.err
    assert plan_id in (tmp_path / "one" / "model_card.md").read_text()
    assert "undone on request" in (tmp_path / "two" / "audit.md").read_text()
