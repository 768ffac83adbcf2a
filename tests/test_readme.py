"""The README keeps its word: its commands exist, its tested Python blocks run, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "README.md"]
BLOCK = re.compile(r"(<!-- tested -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str, *, tested: bool = False) -> list[str]:
    """Code blocks of the README; `tested` keeps those with the mark before them."""
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [code for mark, kind, code in found if kind == language and (mark or not tested)]


def first_words(command: str) -> list[str]:
    """The second word of each line that starts with `command`."""
    lines = [line.split() for block in blocks("bash") for line in block.splitlines()]
    return [words[1] for words in lines if len(words) > 1 and words[0] == command]


def test_every_make_target_in_the_readme_is_in_the_makefile() -> None:
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = first_words("make")
    assert targets, "the README shows no make command"
    assert set(targets) <= set(rules)


def test_every_guardedit_command_in_the_readme_is_a_command() -> None:
    if importlib.util.find_spec("guardedit.cli") is None:
        pytest.skip("guardedit/cli.py is not there")
    import typer

    from guardedit.cli import app

    commands = getattr(typer.main.get_command(app), "commands", {})
    shown = first_words("guardedit")
    assert shown, "the README shows no guardedit command"
    assert set(shown) <= set(commands)


@pytest.mark.parametrize("code", blocks("python", tested=True))
def test_tested_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_block_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_blocks_are_requests_that_are_accepted(code: str) -> None:
    import yaml

    from guardedit.records import EditRequest

    assert [EditRequest.model_validate(item) for item in yaml.safe_load(code)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
