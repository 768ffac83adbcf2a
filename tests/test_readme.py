"""The README keeps its word: its commands exist, its tested Python blocks run, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- tested -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str, page: Path = ROOT / "README.md", *, tested: bool = False) -> list[str]:
    """Code blocks of a page; `tested` keeps those with the mark before them."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for mark, kind, code in found if kind == language and (mark or not tested)]


def shown(command: str) -> list[list[str]]:
    """The words after `command`, for each line of each page's bash blocks that starts with it."""
    lines = [line for page in PAGES for block in blocks("bash", page) for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if len(words) > 1 and words[0] == command]


def test_every_make_target_on_a_page_is_in_the_makefile() -> None:
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = [words[0] for words in shown("make")]
    assert targets, "no page shows a make command"
    assert set(targets) <= set(rules)


def test_every_guardedit_command_on_a_page_exists_with_its_options() -> None:
    import typer

    from guardedit.cli import app

    lines = shown("guardedit")
    assert lines, "no page shows a guardedit command"
    for words in lines:
        command, rest = typer.main.get_command(app), list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
        assert not hasattr(command, "commands"), f"{words} is no command"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, (
            f"{words}: unknown option"
        )


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
