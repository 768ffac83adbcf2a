"""Settings files: what `guardedit tune` writes, and `plan` and `evaluate` take with --hparams.

TOML or JSON. Settings at the top are for every editor; those in a table named like an editor are for that one alone
and win over the others:

    layer = 5

    [rome]
    learning_rate = 1.0
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guardedit.audit.files import write_atomic
from guardedit.editors import EDITORS
from guardedit.errors import BadRequestError
from guardedit.pipeline.kit import require_editor


def read_hparams(path: Path | None, editor: str) -> dict[str, Any]:
    """The file's settings for one editor; none for no file.

    Which settings an editor has is the kit's business (`Kit.settings` refuses others by name). Raises BadRequestError
    for a file that cannot be read, is neither .toml nor .json, or has a table that is no editor.
    """
    if path is None:
        return {}
    require_editor(editor)
    plain = _parsed(path)
    tables = {name: value for name, value in plain.items() if isinstance(value, dict)}
    unknown = sorted(set(tables) - set(EDITORS))
    if unknown:
        raise BadRequestError(
            f"{path.name} has a table {unknown[0]!r}, which is no editor; there are {', '.join(sorted(EDITORS))}"
        )
    common = {name: value for name, value in plain.items() if name not in tables}
    return {**common, **tables.get(editor, {})}


def write_hparams(
    path: Path, editor: str, common: Mapping[str, Any], own: Mapping[str, Any], remark: str
) -> None:
    """Write a settings file, TOML or JSON by its suffix; `remark` goes into a TOML file as a comment."""
    _require_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps({**common, editor: dict(own)}, indent=1) + "\n"
    else:
        lines = [
            *(f"# {line}" for line in remark.splitlines()),
            *_toml(common),
            "",
            f"[{editor}]",
            *_toml(own),
        ]
        text = "\n".join(lines) + "\n"
    write_atomic(path, text.encode())


def _toml(values: Mapping[str, Any]) -> list[str]:
    """Numbers, truth values, texts and lists of them: their JSON form is TOML, too."""
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]


def _parsed(path: Path) -> dict[str, Any]:
    _require_suffix(path)
    try:
        data = path.read_text(encoding="utf-8")
        plain = json.loads(data) if path.suffix == ".json" else tomllib.loads(data)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadRequestError(f"{path} cannot be read: {error}") from error
    if not isinstance(plain, dict):
        raise BadRequestError(f"{path.name} is a {type(plain).__name__}; settings are names with values")
    return plain


def _require_suffix(path: Path) -> None:
    if path.suffix not in (".toml", ".json"):
        raise BadRequestError(f"{path.name}: a settings file ends in .toml or .json")
