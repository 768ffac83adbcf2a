"""`status` and `log` in their plain forms, answered before anything is imported that takes longer than they do.

Whatever is not understood here (another option, a mistake, an error) goes the usual way, which prints the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guardedit.audit.index import Slip
from guardedit.errors import GuardeditError
from guardedit.pipeline.overview import overview, slips_of

HOME = Path(".guardedit")
# Control, bidi and zero-width characters, but for tab and line break.
_UNTAMED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_BREAKS = re.compile("[\t\n]")
MODEL = "smollm2-135m"


class _Asked(NamedTuple):
    words: list[str]
    home: Path
    model: str
    as_json: bool


def answer(arguments: Sequence[str]) -> str | None:
    """What the command prints; None where the whole command line has to look at it."""
    asked = _parsed(arguments)
    if asked is None:
        return None
    try:
        if asked.words == ["status"]:
            found = overview(asked.home, asked.model)
            return document_text(found) if asked.as_json else tame(status_text(found))
        if asked.words[:1] == ["log"] and len(asked.words) <= 2 and not asked.as_json:
            return tame(log_text(slips_of(asked.home), *asked.words[1:]))
    except GuardeditError:
        return None
    return None


def _parsed(arguments: Sequence[str]) -> _Asked | None:
    """The words and options; None for an option that is not known here. What stands later wins."""
    words: list[str] = []
    named: dict[str, str] = {}
    as_json, left = False, list(arguments)
    while left:
        word = left.pop(0)
        if word == "--json":
            as_json = True
        elif word in ("--home", "--model") and left:
            named[word] = left.pop(0)
        elif word.startswith("-"):
            return None
        else:
            words.append(word)
    return _Asked(words, Path(named.get("--home", HOME)), named.get("--model", MODEL), as_json)


def tame(text: str) -> str:
    """Text for a terminal, with control, bidi and zero-width characters as code points: none acts, none hides."""
    return _UNTAMED.sub(_code_point, text)


def _one_line(text: str) -> str:
    """As `tame`, and nothing in it begins a line of its own."""
    return tame(_BREAKS.sub(_code_point, text))


def _code_point(found: re.Match[str]) -> str:
    return f"<U+{ord(found[0]):04X}>"


def document_text(document: dict[str, Any]) -> str:
    """One JSON document as all commands print it."""
    return json.dumps(document, indent=1, ensure_ascii=False, default=str)


def status_text(found: dict[str, Any]) -> str:
    """`overview` for people."""
    lines = [f"{found['model']}  {found['digest'] or 'nothing planned yet'}  ({found['version'] or 'base'})"]
    lines += [
        f"  {p['plan_id']:40} {p['state']:15} {p['editor']:10} {_one_line(p['edit'])}" for p in found["plans"]
    ]
    lines += [
        f"  REVIEW {'OVERDUE' if r['overdue'] else 'open'}: {r['plan_id']} let through by {_one_line(r['by'])}, "
        f"ticket {_one_line(r['ticket'])}, "
        f"due {r['due'][:16]}; close with `guardedit reviewed {r['plan_id']} --note ...`"
        for r in found["reviews"]
    ]
    return "\n".join(lines)


def log_text(slips: Iterable[Slip], edit_id: str | None = None) -> str:
    """The entries, one a line; of one edit where it is named."""
    kept = [slip for slip in slips if edit_id in (None, slip.edit_id)]
    lines = [f"{s.seq:5} {s.at[:19]} {s.kind:12} {s.edit_id or ''}  {s.digest[7:19]}" for s in kept]
    return "\n".join(lines) or "the ledger is empty"
