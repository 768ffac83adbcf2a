"""The front door: light to import, and `--help` comes before anything heavy is loaded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "mlflow", "sae_lens", "transformer_lens", "sklearn", "matplotlib", "pandas")
with_cli = pytest.mark.skipif(
    importlib.util.find_spec("guardedit.cli") is None, reason="guardedit/cli.py is not there"
)


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter has loaded after running `code`."""
    report = f"{code}\nimport sys; print('LOADED', *[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_the_probe_for_heavy_packages_sees_one() -> None:
    assert loaded_by("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == {"torch"}


@pytest.mark.parametrize("name", ["guardedit", "guardedit.records", "guardedit.errors", "guardedit.config"])
def test_importing_a_light_module_loads_nothing_heavy(name: str) -> None:
    assert loaded_by(f"import {name}") == set()


@pytest.mark.parametrize("name", ["guardedit.gate", "guardedit.audit"])
def test_deciding_and_recording_load_no_model_library(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not there")
    walk = (
        f"import importlib, pkgutil, {name} as room\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(room.__path__, room.__name__ + '.')]"
    )
    assert not loaded_by(walk) & {"torch", "transformers", "sae_lens", "transformer_lens", "mlflow"}


def test_the_package_names_what_it_offers() -> None:
    import guardedit

    assert set(guardedit.__all__) <= set(dir(guardedit))
    with pytest.raises(AttributeError, match="no attribute 'opn'"):
        guardedit.opn


@with_cli
def test_help_is_printed_without_loading_anything_heavy() -> None:
    code = "import sys; sys.argv = ['guardedit', '--help']\nfrom guardedit.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    assert loaded_by(code) == set()


@with_cli
def test_every_command_has_help_and_stands_in_the_readme() -> None:
    import typer

    from guardedit.cli import app

    commands = getattr(typer.main.get_command(app), "commands", {})
    assert commands
    table = "\n".join(
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    )
    for name, command in commands.items():
        if command.hidden:
            continue
        assert command.help or command.short_help, f"{name} has no help"
        assert re.search(rf"`{re.escape(name)}[ `]", table), f"{name} is not in the README's table"


@with_cli
def test_every_command_in_the_readmes_table_exists() -> None:
    import typer

    from guardedit.cli import app

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page.split("| command |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    shown = [name.split() for row in rows for name in re.findall(r"`([a-z]+(?: [a-z]+)*)[^`]*`", row)]
    assert len(shown) > 10
    root = getattr(typer.main.get_command(app), "commands", {})
    for first, *rest in shown:
        assert first in root, f"the README shows {first}"
        if rest:
            assert rest[0] in getattr(root[first], "commands", {}), f"the README shows {first} {rest[0]}"
