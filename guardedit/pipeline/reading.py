"""Request files: YAML, JSON or JSON lines. What is wrong with one entry is said with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.records import EditRequest

LINES = (".jsonl", ".ndjson")
"""File name endings of JSON lines: a request a line."""


def read_requests(path: Path) -> tuple[EditRequest, ...]:
    """Requests of a YAML or JSON file (one mapping, or a list of them), or of JSON lines.

    Raises BadRequestError naming the file, the entry, its line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"{path} cannot be read: {error}") from error
    entries = _json_lines(text, path) if path.suffix.lower() in LINES else _yaml_entries(text, path)
    found = tuple(
        read_request(entry, f"{path}, request {number} (line {line})")
        for number, (line, entry) in enumerate(entries, start=1)
    )
    if not found:
        raise BadRequestError(f"{path} holds no request")
    return found


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers, from 1, and values; empty lines are passed over."""
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"{path}, line {line} is not JSON: {error}") from error


def _yaml_entries(text: str, path: Path) -> list[tuple[int, Any]]:
    """Each entry's first line, from 1, and its value. libyaml's parser is taken where PyYAML was built with it."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return [(1, None)]
        nodes = root.value if isinstance(root, yaml.SequenceNode) else [root]
        return [(node.start_mark.line + 1, loader.construct_document(node)) for node in nodes]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadRequestError(f"{path} cannot be read: {error}") from error
    finally:
        loader.dispose()


def read_request(entry: Any, where: str) -> EditRequest:
    """One request; raises BadRequestError naming `where`, the key, the value and what is allowed."""
    from pydantic import ValidationError

    if not isinstance(entry, dict):
        raise BadRequestError(f"{where} is {type(entry).__name__}; a request is a mapping of {_keys()}")
    unknown = sorted(str(key) for key in entry if key not in EditRequest.model_fields)
    if unknown:
        raise BadRequestError(f"{where}: unknown key {unknown[0]!r}; allowed are {_keys()}")
    try:
        return EditRequest.model_validate(entry)
    except BadRequestError as error:
        raise BadRequestError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequestError(
            f"{where}: {place}: {first['msg']}, got {first.get('input')!r}"[:400]
        ) from error


def _keys() -> str:
    return ", ".join(EditRequest.model_fields)
