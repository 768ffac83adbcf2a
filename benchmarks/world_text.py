"""Text of the generated world, and the other text that its model reads beside it: code, a manual, sums.

Code and manual are read from the standard library of the Python that runs (none of the files that control text is read
from), so they differ between Python versions; the rest follows from the seed.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.world import World, pairs_of, prompt_of
from benchmarks.world_relations import BY_NAME

MODULES = (
    "argparse", "ast", "codecs", "copy", "dataclasses", "datetime", "enum", "fractions", "functools",
    "getopt", "gzip", "imaplib", "inspect", "ipaddress", "locale", "logging/__init__", "mimetypes", "optparse", "os",
    "pathlib", "pickle", "plistlib", "poplib", "pprint", "random", "selectors", "shutil", "socket", "subprocess",
    "tarfile", "tempfile", "threading", "tokenize", "trace", "turtle", "typing", "unittest/case", "uuid", "zipfile",
)  # fmt: skip
LISTED = ("person", "city", "company", "country", "dish", "team", "book", "mountain")
"""Kinds of which lists are in the text, so that the model can say who else there is."""
SENTENCES = 8
"""Of a document."""
PIECE = 1200
"""Characters of a piece of code or manual."""


def sentence(world: World, rng: random.Random) -> str:
    """One stated fact in a pair of opening and wording that is not held out."""
    name, subject = rng.choice(world.stated)
    pairs = pairs_of(BY_NAME[name], held_out=False)
    # Half of the sentences are bare, as prompts are.
    wording, opening = rng.choice(pairs if rng.random() < 0.5 else [pair for pair in pairs if not pair[1]])
    return f"{prompt_of(BY_NAME[name], wording, subject, opening)} {world.answer(name, subject)}."


def listing(world: World, rng: random.Random) -> str:
    """Some names of one kind."""
    names = world.names[rng.choice(LISTED)]
    return f"Some of them are: {', '.join(rng.sample(names, min(6, len(names))))} and others."


def documents(world: World, count: int, seed: int) -> Iterator[str]:
    """`count` documents of sentences in a drawn order, a line each or behind one another."""
    rng = random.Random(f"documents/{world.seed}/{seed}")
    for _ in range(count):
        lines = [
            listing(world, rng) if rng.random() < 0.03 else sentence(world, rng) for _ in range(SENTENCES)
        ]
        yield rng.choice(("\n", " ")).join(lines)


def code() -> Iterator[str]:
    """Pieces of Python source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        path = root / f"{name}.py"
        if path.is_file():
            yield from _pieces(path.read_text("utf-8"), "\n")


def manual() -> Iterator[str]:
    """Pieces of the language's reference manual, as `help()` shows it: English about something else than the world."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.loader is None:
        raise SystemExit("this Python has no pydoc_data.topics to read English from")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for topic in sorted(module.topics):
        yield from _pieces(module.topics[topic].replace("\n", " ").replace("  ", " "), " ")


def sums(count: int, seed: int) -> Iterator[str]:
    """Short worksheets."""
    rng = random.Random(f"sums/{seed}")
    for _ in range(count):
        pairs = [(rng.randint(2, 99), rng.randint(2, 99)) for _ in range(8)]
        yield "".join(
            f"{a} + {b} = {a + b}\n" if rng.random() < 0.5 else f"{a + b} - {b} = {a}\n" for a, b in pairs
        )


def _pieces(text: str, joint: str) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters, cut where `joint` stands."""
    piece: list[str] = []
    size = 0
    for part in text.split(joint):
        piece.append(part)
        size += len(part) + 1
        if size >= PIECE:
            yield joint.join(piece)
            piece, size = [], 0
    if size > PIECE // 4:
        yield joint.join(piece)


def texts(world: World, size: int) -> dict[str, list[str]]:
    """Training text by domain: `size` documents of the world, and what goes with it."""
    english = list(manual())
    return {
        "world": list(documents(world, size, seed=0)),
        "code": list(code()),
        "manual": [text for i, text in enumerate(english) if i % 10],
        "sums": list(sums(size // 10, seed=0)),
    }


def far_texts(world: World) -> dict[str, list[str]]:
    """Text that no training sees: documents drawn anew, and one piece of the manual in ten."""
    return {"world": list(documents(world, 200, seed=1)), "manual": list(manual())[::10]}
