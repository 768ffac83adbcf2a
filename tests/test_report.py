"""The audit report: one record, three prints that agree, nothing hidden, nothing that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import builders
import pytest
from builder_parts import digest
from hypothesis import given
from hypothesis import strategies as st

from guardedit.audit import report
from guardedit.audit.words import mixed_scripts, number, percent, quantity, visible
from guardedit.errors import StorageError
from guardedit.records import AuditReport, EditRequest

REPORTS = builders.everything()
NAMES = [f"{a.outcome}-{a.plan.editor}" for a in REPORTS]


class Page(HTMLParser):
    """The parts of a page that the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(audit: AuditReport) -> str:
    return report.html(report.sheet_of(audit), "sha256:" + "0" * 64)


def markdown_of(audit: AuditReport) -> str:
    return report.markdown(report.sheet_of(audit), "sha256:" + "0" * 64)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: page_of(audit) for name, audit in zip(NAMES, REPORTS, strict=True)}


def with_request(request: EditRequest) -> AuditReport:
    audit = builders.france_blocked()
    return audit.model_copy(update={"plan": audit.plan.model_copy(update={"requests": (request,)})})


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


@pytest.mark.parametrize("name", NAMES)
def test_the_page_runs_nothing_and_loads_nothing(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "img"} & {
        t for t, _ in page.tags
    }
    for tag, attrs in page.tags:
        assert not [a for a in attrs if a.startswith("on") or a in ("src", "srcset", "action")], tag
        assert (attrs.get("href") or "#").startswith("#"), attrs
    assert "url(http" not in pages[name] and "@import" not in pages[name]
    assert len(pages[name].encode()) < 500_000


@pytest.mark.parametrize("name", NAMES)
def test_the_page_can_be_read_by_ear_and_by_keyboard(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    assert page.all("a")[0]["href"] == "#main" and "main" in ids
    referred = " ".join(a["aria-labelledby"] or "" for _, a in page.tags if "aria-labelledby" in a).split()
    assert referred and set(referred) <= set(ids)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    assert all(
        a["tabindex"] == "0" and a["aria-label"] for a in page.all("div") if a.get("class") == "scroll"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_described_and_has_its_data_beneath(pages: dict[str, str], name: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>(.*?)(?=<figure>|</section>)", pages[name], re.DOTALL)
    assert drawn and all("<details>" in rest and "<table>" in rest for rest in drawn)
    for svg in re.findall(r"<svg.*?</svg>", pages[name], re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img"
        assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]
        assert all(child.text for child in list(root)[:2])
        assert "#0102" not in svg, "a stand-in colour was left in"


def test_a_verdict_is_an_icon_and_a_word_never_only_a_colour(pages: dict[str, str]) -> None:
    for text in pages.values():
        signs = re.findall(r'class="sign [a-z]+"><span aria-hidden="true">(.+?)</span> (.*?)</span>', text)
        assert signs and all(icon.strip() and word.strip() for icon, word in signs)
    words = {re.search(r'<p class="word">(.+?)</p>', text).group(1) for text in pages.values()}  # type: ignore[union-attr]
    assert len(words) == len(REPORTS)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_in_dark_and_on_paper() -> None:
    style = (Path(report.__file__).parent / "templates" / "style.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 3
    pairs = [
        (text, ground)
        for text in ("ink", "muted", "link", "good", "bad", "unsure")
        for ground in ("page", "panel")
    ]
    pairs += [("good", "good-soft"), ("bad", "bad-soft"), ("unsure", "unsure-soft"), ("ink", "soft")]
    pairs += [("ink", f"{tone}-soft") for tone in ("good", "bad", "unsure")]
    for theme in themes:
        for text, ground in pairs:
            light, dark = sorted((_luminance(theme[text]), _luminance(theme[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, theme[text], theme[ground])


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></svg><b>x",
    "a|b `c` **d** [e](javascript:f) $x^2$ {{7*7}} {%x%} &amp;",
    "line\nbreak\ttab\x00null\x1b[31m",
    "safe\u202egnp.exe",
    "in\u200bvi\u2060si\ufeffble\u00ad",
    "tag\U000e0041 soft\u115fhidden",
)


@pytest.mark.parametrize("evil", HOSTILE)
def test_text_of_a_request_stays_text(evil: str) -> None:
    audit = with_request(EditRequest(subject=evil, prompt="The {} is in", target_new=evil + "1", reason=evil))
    clean = Page(
        page_of(with_request(EditRequest(subject="x", prompt="The {} is in", target_new="y", reason="z")))
    )
    page = Page(page_of(audit))
    assert [t for t, _ in page.tags].count("b") == 0
    assert {t for t, _ in page.tags} == {t for t, _ in clean.tags}
    assert visible(evil).split()[0] in page.text
    for hidden in (c for c in evil if visible(c) != c):
        assert hidden not in page.text.replace("\n", " ") or hidden in "\n\t"
        assert f"U+{ord(hidden):04X}" in page.text


@pytest.mark.parametrize("evil", HOSTILE)
def test_text_of_a_request_cannot_break_a_row_of_markdown(evil: str) -> None:
    audit = with_request(EditRequest(subject=evil, prompt="The {} is in", target_new=evil + "1", reason=evil))
    for block in re.findall(r"(?:^\|.*\n)+", markdown_of(audit), re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block
    assert not re.search(r"(?<!\\)<script|(?<!\\)<img", markdown_of(audit))


@given(st.text(max_size=40))
def test_visible_text_has_no_character_that_hides_or_reorders(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert visible(shown) == shown
    assert not set(shown) & set(
        "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\ufe0f"
    )


def test_a_look_alike_letter_is_pointed_out() -> None:
    audit = with_request(EditRequest(subject="P\u0430ris", prompt="{} is in", target_new="Rome"))
    assert "а U+0430" in Page(page_of(audit)).text
    assert mixed_scripts("São Tomé") is None and mixed_scripts("東京") is None


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


def test_a_page_with_every_latent_moved_stays_small() -> None:
    audit = builders.finetune_rolled_back()
    assert audit.drift is not None
    many = tuple(
        x.model_copy(update={"latent": i, "significant": i % 2 == 0, "label": "long label " * 9})
        for i in range(24)
        for x in audit.drift.latents
    )
    full = audit.drift.model_copy(update={"latents": many})
    text = page_of(
        audit.model_copy(update={"drift": full, "drift_base": full.model_copy(update={"reference": "base"})})
    )
    assert len(text.encode()) < 500_000
    assert "10,080 latents are on record" in Page(text).text


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


def test_a_link_in_the_list_cannot_be_a_script(tmp_path: Path) -> None:
    entry = report.index_entry(REPORTS[0], "javascript:alert(1)")
    page = Page(report.render_index([entry], tmp_path).read_text())
    assert page.all("a")[1]["href"] == "./javascript%3Aalert%281%29"


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        report.render(builders.france_blocked(), tmp_path / "file" / "reports")
