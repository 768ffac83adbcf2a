"""The pages pass axe-core without a violation, in light and in dark, as a browser draws them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
from audit_helpers import OPEN, whole_story

from guardedit.audit import period_report, report
from guardedit.pipeline.auditing import audit

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
MAX_BYTES = 500_000


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind of ending, the audit over a period, and the list of reports."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for number, one in enumerate(builders.everything()):
        found[one.outcome] = report.render(one, folder / str(number)).html
    story = whole_story(folder / "story")
    found["audit"] = period_report.render(audit(story.workspace, OPEN), folder / "audit").html
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by playwright; the test is skipped where one of them is missing."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra guardedit[dev]")
    pytest.importorskip(
        "axe_playwright_python", reason="axe-playwright-python is in the extra guardedit[dev]"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with driver.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def violations(browser: Any, page_file: Path) -> list[str]:
    """What axe-core objects to on the page as it is drawn, in light and then in dark; folded parts are unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    # The page's own policy forbids scripts: the checker has to be let in.
    context = browser.new_context(color_scheme="light", bypass_csp=True)
    page = context.new_page()
    try:
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        light = Axe().run(page).response
        page.emulate_media(color_scheme="dark")
        # Nothing but colours differs in the dark.
        dark = Axe().run(page, options={"runOnly": ["color-contrast", "link-in-text-block"]}).response
    finally:
        context.close()
    for found in (light, dark):
        assert found["passes"] or found["violations"], "axe looked at nothing"
    return [
        f"{scheme}: {v['id']} ({v['impact']}): {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
        for scheme, found in (("light", light), ("dark", dark))
        for v in found["violations"]
        for node in v["nodes"][:3]
    ]


@pytest.mark.parametrize("name", ["rolled-back", "audit"])
def test_the_fullest_report_and_the_audit_have_no_violation(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    found = violations(browser, pages[name])
    assert not found, json.dumps(found, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["committed", "blocked", "needs-approval"])
def test_no_other_report_has_a_violation(browser: Any, pages: dict[str, Path], name: str) -> None:
    found = violations(browser, pages[name])
    assert not found, json.dumps(found, indent=1)


def test_the_check_sees_a_page_that_cannot_be_read(browser: Any, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        "<html><body><img src='x.png'><p style='color:#ddd;background:#fff'>pale</p></body></html>"
    )
    said = " ".join(violations(browser, spoilt))
    assert all(
        rule in said for rule in ("image-alt", "color-contrast", "html-has-lang", "dark: color-contrast")
    )


def test_every_page_is_small(pages: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in pages.items()}
    assert max(sizes.values()) < MAX_BYTES, sizes
