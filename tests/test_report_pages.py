"""The report's page runs nothing, hides nothing and can be read by everybody; text of a request stays text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import NAMES, REPORTS, Page, markdown_of, page_of, pages

from guardedit.audit import report
from guardedit.audit.words import mixed_scripts, visible
from guardedit.records import AuditReport, EditRequest

__all__ = ["pages"]


def with_request(request: EditRequest) -> AuditReport:
    audit = builders.france_blocked()
    return audit.model_copy(update={"plan": audit.plan.model_copy(update={"requests": (request,)})})


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


def test_a_link_in_the_list_cannot_be_a_script(tmp_path: Path) -> None:
    entry = report.index_entry(REPORTS[0], "javascript:alert(1)")
    page = Page(report.render_index([entry], tmp_path).read_text())
    assert page.all("a")[1]["href"] == "./javascript%3Aalert%281%29"
