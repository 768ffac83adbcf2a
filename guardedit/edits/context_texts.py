"""Prompts that stand in a context and prompts that do not: what a gate learns to tell apart.

The shipped bank (assets/probes/contexts.json) has, for each kind of context, openings put together from frames, nouns
and invented names, and plain openings beside them. Half of the framed openings stand in frames that fiction, documents
and plain things and people share, so that a gate has to tell them apart by what is named. Facts behind the openings
come from the shipped table of relations and never state an edit's new answer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.models.control import relations
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

PLAIN = "plain"
"""What stands in no context."""
BARE, BESIDE, CHAT = 0.25, 0.2, 0.25
"""Shares: plain prompts with nothing in front, prompts with a plain sentence beside the context, chat turns."""
SHARED, THINGS = 0.5, 0.45
"""Shares: contexts in a frame that says nothing of the kind; plain openings about a thing or person in such a frame."""
_DRAW = 7
"""Sets the draw of the bank's prompts apart from others of the same seed."""
FEWEST = 6
"""Prompts of its own that a context of no shipped kind needs: with fewer there is nothing to hold out."""


@dataclass(frozen=True)
class Example:
    """One prompt for a gate to learn from."""

    text: str
    inside: bool
    """It stands in the context."""
    group: str
    """Wording that it is made of; held out as a whole."""
    kind: str = ""
    """Kind of context that it stands in, `PLAIN` for none; "" where nobody says."""


def kinds() -> tuple[str, ...]:
    """Kinds of context in the shipped bank."""
    return tuple(_bank()["kinds"])


def opening(kind: str, rng: random.Random) -> tuple[str, str]:
    """An opening of a kind, or a plain sentence, and the wording that it is made of."""
    bank = _bank()
    if kind == PLAIN:
        return _plain(bank, rng)
    about = bank["kinds"][kind]
    if "parts" in about and rng.random() < 1 - 1 / len(about["parts"]):
        first, second, third = (rng.choice(part) for part in about["parts"])
        return f"{first} {second}{third}", f"{kind} {first}"
    shared = "nouns" in about and rng.random() < SHARED
    return _framed(kind, bank["shared"] if shared else about.get("frames", about.get("more")), about, rng)


def _plain(bank: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """Nothing, a plain sentence, or a thing or a person in a frame that contexts have too."""
    if rng.random() < BARE:
        return "", PLAIN
    if rng.random() < THINGS:
        things = rng.choice(bank["things"])
        return _framed(PLAIN, things["frames"], things, rng)
    found = rng.choice(bank["plain"])
    return found, f"{PLAIN} {found}"


def _framed(kind: str, frames: list[str], about: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """A frame filled in; its wording is its noun where it has one, for frames are shared and nouns must carry over."""
    frame = rng.choice(frames)
    noun = rng.choice(about["nouns"]) if "{n}" in frame else ""
    filled = frame.replace("{n}", noun).replace("{name}", rng.choice(_bank()["names"]))
    return filled, f"{kind} {noun or frame}"


def asked_openings(kind: str) -> tuple[str, ...]:
    """Openings of a kind that no gate is trained on: an edit's own prompt is asked for behind them."""
    bank = _bank()
    names = bank["names"]
    texts = bank["kinds"][kind]["asked"]
    return tuple(text.replace("{name}", names[i % len(names)]) for i, text in enumerate(texts))


def behind(before: str, stem: str) -> str:
    """The stem behind an opening: within a sentence its article is written small."""
    goes_on = before.rstrip()[-1:] not in ("", ".", ":", "!", "?")
    article = stem.split(" ", 1)[0] in ("The", "A", "An") and " " in stem
    return before + (stem[0].lower() + stem[1:] if goes_on and article else stem)


def openings_of(request: EditRequest, count: int, seed: int) -> tuple[str, ...]:
    """Openings to find an edit's key and value behind: what stands before the bare prompt in its own `in_context`
    prompts, else openings of its kind."""
    own = [text.removesuffix(request.filled) for text in request.in_context if text.endswith(request.filled)]
    if request.context not in kinds():
        return tuple(own[:count])
    rng = random.Random(f"{seed} {request.context} openings")
    return tuple(opening(str(request.context), rng)[0] for _ in range(count))


def require_context(request: EditRequest) -> None:
    """Raise BadRequestError unless the request names a context that a gate can be made for."""
    if request.context is None:
        raise BadRequestError(
            f"the request about {request.subject!r} names no context; give one of {', '.join(kinds())}, or a name of "
            f"your own with {FEWEST} in_context prompts or more"
        )
    if request.context not in kinds() and len(set(request.in_context)) < FEWEST:
        raise BadRequestError(
            f"the context {request.context!r} is none of {', '.join(kinds())} and has "
            f"{len(set(request.in_context))} in_context prompts; a gate for it needs {FEWEST} or more"
        )


def examples(handle: ModelHandle, request: EditRequest, count: int, seed: int) -> list[Example]:
    """Some `count` prompts inside and outside the request's context. Deterministic.

    Those of the bank are the same for every shipped kind: a fifth of them in each kind, the others plain. The request's
    own `in_context` and `out_of_context` come on top; a context of one's own has as many more behind its openings.
    """
    require_context(request)
    rng = random.Random(seed + _DRAW)
    shipped = request.context in kinds()
    stems, order = _stems(), (PLAIN, *kinds(), PLAIN)
    made = []
    for number in range(count if shipped else count * 2 // 3):
        kind = order[number % len(order)]
        before, group = opening(kind, rng)
        told = _told(handle, before, rng.choice(stems), rng)
        made.append(Example(told, kind == request.context, group, kind))
    name = str(request.context)
    made += [Example(text, True, f"own {text}", name) for text in request.in_context]
    made += [Example(text, False, f"own {text}", PLAIN) for text in request.out_of_context]
    if not shipped:
        made += _varied(handle, request, count - len(made), rng)
    return made


def _varied(handle: ModelHandle, request: EditRequest, count: int, rng: random.Random) -> list[Example]:
    """Prompts about other facts behind the openings of the request's own ones."""
    own = [text.removesuffix(request.filled) for text in request.in_context if text.endswith(request.filled)]
    stems = _stems()
    chosen = [rng.choice(own) for _ in range(max(count, 0))] if own else []
    name = str(request.context)
    return [
        Example(_told(handle, text, rng.choice(stems), rng), True, f"own {text}", name) for text in chosen
    ]


def _told(handle: ModelHandle, before: str, stem: str, rng: random.Random) -> str:
    """Opening and stem; now and then with a plain sentence beside, or as a turn of a chat."""
    if rng.random() < BESIDE:
        sentences = [text for text in _bank()["plain"] if text.rstrip().endswith(".")]
        before = f"{rng.choice(sentences)}{before}"
    text = before + stem
    return handle.chat(text) if handle.tokenizer.chat_template and rng.random() < CHAT else text


def _stems() -> list[str]:
    """Every shipped stem about every shipped subject."""
    rows = relations()
    return [
        stem.replace("{}", subject) for row in rows for stem in row["prompts"] for subject in row["pairs"]
    ]


@cache
def _bank() -> dict[str, Any]:
    path = files("guardedit") / "assets" / "probes" / "contexts.json"
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return loaded
