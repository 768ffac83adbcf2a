"""Checks of editors' settings: a value from a YAML file is whatever somebody typed ("1e-3" is text there)."""

from __future__ import annotations

import math
from typing import Any

from guardedit.errors import BadRequestError


def require_number(
    settings: Any, name: str, *, least: float, whole: bool = False, above: bool = False
) -> None:
    """Raise BadRequestError unless the field is a finite number (an integer for `whole`) of at least `least`.

    With `above` it must be more than `least`.
    """
    value = getattr(settings, name)
    known = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if known and math.isfinite(value) and (value > least or (value == least and not above)):
        return
    kind = "a whole number" if whole else "a number"
    raise BadRequestError(
        f"{name} is {value!r}; it must be {kind} {'above' if above else 'of at least'} {least:g}"
    )


def require_contexts(contexts: Any) -> None:
    """Raise BadRequestError unless these are texts of which the first is "", the bare prompt."""
    texts = isinstance(contexts, (tuple, list)) and all(isinstance(text, str) for text in contexts)
    if not texts or not contexts or contexts[0]:
        raise BadRequestError(
            f'contexts are {contexts!r}; they must be texts, the first one "" (the bare prompt)'
        )
