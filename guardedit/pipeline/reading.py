"""Request files: YAML, JSON or JSON lines. What is wrong with one entry is said with its line."""

from __future__ import annotations

import json
import reprlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.records import EditRequest

MAX_TEXT = 10_000
"""Characters in one text of a request; a subject or an answer is some words, a probe some sentences."""
MAX_TEXTS = 1_000
"""Probes of one kind in one request."""
MAX_DEPTH = 32
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
            yield line, json.loads(raw, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"{path}, line {line} is not JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping whose keys stand there once: of two, one reader would take the first and another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _yaml_entries(text: str, path: Path) -> list[tuple[int, Any]]:
    """Each entry's first line, from 1, and its value. libyaml's parser is taken where PyYAML was built with it."""
    import yaml

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = kind(text)
    try:
        _require_flat(text, kind)
        root = loader.get_single_node()
        if root is None:
            return [(1, None)]
        nodes = root.value if isinstance(root, yaml.SequenceNode) else [root]
        for node in nodes:
            if isinstance(node, yaml.MappingNode):
                _once([(str(key.value), None) for key, _ in node.value])
        return [(node.start_mark.line + 1, loader.construct_document(node)) for node in nodes]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadRequestError(f"{path} cannot be read: {error}") from error
    finally:
        loader.dispose()


def _require_flat(text: str, kind: Any) -> None:
    """ValueError for a file that is nested deeper than any request: composing it would overflow the parser's stack."""
    import yaml

    depth = 0
    for event in yaml.parse(text, kind):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def read_request(entry: Any, where: str) -> EditRequest:
    """One request; raises BadRequestError naming `where`, the key, the value and what is allowed."""
    from pydantic import ValidationError

    if not isinstance(entry, dict):
        raise BadRequestError(f"{where} is {type(entry).__name__}; a request is a mapping of {_keys()}")
    unknown = sorted(str(key) for key in entry if key not in EditRequest.model_fields)
    if unknown:
        raise BadRequestError(f"{where}: unknown key {unknown[0]!r}; allowed are {_keys()}")
    _check_texts(entry, where)
    try:
        return EditRequest.model_validate(entry)
    except BadRequestError as error:
        raise BadRequestError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequestError(
            f"{where}: {place}: {first['msg']}, got {reprlib.repr(first.get('input'))}"[:400]
        ) from error


def _check_texts(entry: dict[str, Any], where: str) -> None:
    """Refuse texts that are too long to be read by whoever approves, or that are other bytes than they look like."""
    for key, value in entry.items():
        texts = value if isinstance(value, list | tuple) else [value]
        if len(texts) > MAX_TEXTS:
            raise BadRequestError(f"{where}: {key} holds {len(texts)} texts; at most {MAX_TEXTS} are allowed")
        for text in texts:
            if not isinstance(text, str):
                continue
            if len(text) > MAX_TEXT:
                raise BadRequestError(
                    f"{where}: {key} has {len(text)} characters; at most {MAX_TEXT} are allowed"
                )
            if not unicodedata.is_normalized("NFC", text):
                raise BadRequestError(
                    f"{where}: {key} {ascii(text)[:80]} is not in Unicode's composed form (NFC): it looks like another "
                    "text and has other tokens; write it composed"
                )


def _keys() -> str:
    return ", ".join(EditRequest.model_fields)
