"""Reports of every ending, and the parts of a page that tests ask about."""

from __future__ import annotations

from html.parser import HTMLParser

import builders
import pytest

from guardedit.audit import report
from guardedit.records import AuditReport

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
