"""What a plan's record says it was solved with: settings, whose lists stand there as one text, and other inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from guardedit.editors import EDITORS
from guardedit.records import Plan

_ENDS = re.compile(r"[|,]")


def recorded_settings(plan: Plan) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The editor's settings by name, and the names of lists of which the record does not say where one text ends,
    because a text holds the separator; those are left out."""
    recorded = plan.delta.hparams
    found, unclear = dict[str, Any](), list[str]()
    for field in fields(EDITORS[plan.editor].hparams):
        if field.name not in recorded:
            continue
        value = recorded[field.name]
        if not (isinstance(field.default, tuple) and isinstance(value, str)):
            found[field.name] = value
            continue
        listed = _texts(value, recorded) if field.name == "contexts" else _words(value)
        if listed is None:
            unclear.append(field.name)
        else:
            found[field.name] = listed
    return found, tuple(unclear)


def _texts(text: str, recorded: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Contexts; None where there are not as many as the record counts."""
    parts = tuple(text.split("|"))
    return parts if len(parts) == recorded.get("n_prefixes", len(parts) - 1) + 1 else None


def _words(text: str) -> tuple[int | str, ...]:
    """Layers, or names of parts."""
    return tuple(int(part) if part.isdigit() else part for part in _ENDS.split(text) if part)
