"""Control text: ordinary text that no edit is about, in four domains, and simple facts beside it.

`prose` and `chat` were sampled from the default model and ship with the package; `python` is read from the standard
library of the running interpreter (so it differs between Python versions, and its digest is on record); `arithmetic` is
made by a seeded rule. Each domain has two halves without a text in common: what is known before an edit is calibrated
on the one ("calibrate"), and the monitor afterwards looks at the other ("test").
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from guardedit.config import cache_folder
from guardedit.errors import BadRequestError, MissingStatisticsError
from guardedit.models import tokens
from guardedit.models.handle import ModelHandle
from guardedit.records import digest_of

Half = Literal["calibrate", "test"]
Progress = Callable[[str, int], None]
"""Told what is being made and how many pieces of it there are."""

DOMAINS = ("prose", "chat", "python", "arithmetic")
PYTHON_FILES: dict[Half, tuple[str, ...]] = {
    "calibrate": ("textwrap", "heapq", "calendar", "fnmatch", "queue", "shlex", "json/decoder", "glob", "csv", "cmd"),
    "test": ("bisect", "statistics", "colorsys", "configparser", "difflib", "json/encoder", "string", "sched", "code",
             "tabnanny", "zipapp", "mailbox", "ftplib", "pstats"),
}  # fmt: skip
"""Standard library files of the domain `python`, by half."""
_PIECE = 1200  # characters of a piece of Python source, cut at line ends


@dataclass(frozen=True)
class Fact:
    """A plain fact that an edit elsewhere must leave alone."""

    subject: str
    prompt: str
    """A stem with one `{}` for the subject."""
    answer: str
    relation: str
    known: bool
    """Whether the default model's most likely next token begins the answer."""

    @property
    def filled(self) -> str:
        """The stem with its subject."""
        return self.prompt.replace("{}", self.subject)


def control_texts(
    handle: ModelHandle, domain: str, n_tokens: int, seed: int = 0, half: Half = "calibrate"
) -> list[str]:
    """Texts of one domain and half, in an order that `seed` decides, until `n_tokens` tokens of `handle` are there.

    Fewer come back where the text ends (shipped: some 12k tokens of prose and 10k of chat a half); count before you
    claim. Chat is rendered through the model's own chat template, or as question and answer where it has none.
    Raises BadRequestError for an unknown domain or half.
    """
    if domain not in DOMAINS:
        raise BadRequestError(f"control domain {domain!r} is unknown; there are {', '.join(DOMAINS)}")
    if half not in ("calibrate", "test"):
        raise BadRequestError(f"half {half!r} is neither 'calibrate' nor 'test'")
    if domain == "arithmetic":
        return _until(handle, _arithmetic(seed, half), n_tokens)
    texts = list(_python(half)) if domain == "python" else _sampled(handle, domain, half)
    random.Random(f"{domain}/{half}/{seed}").shuffle(texts)
    return _until(handle, texts, n_tokens)


def control_digest(texts: Iterable[str]) -> str:
    """`sha256:…` of a list of texts: what a result that rests on them has to name."""
    return digest_of(list(texts))


def load_facts(handle: ModelHandle | None = None, known_only: bool = True) -> tuple[Fact, ...]:
    """The facts prepared for a model, else the shipped ones; by default those that it was found to know."""
    rows = [Fact(**row) for row in _rows((_shipped() if handle is None else _folder(handle)) / "facts.jsonl")]
    return tuple(fact for fact in rows if fact.known or not known_only)


def _until(handle: ModelHandle, texts: Iterable[str], n_tokens: int) -> list[str]:
    """Texts from the front until they hold `n_tokens` tokens."""
    taken: list[str] = []
    total = 0
    for text in texts:
        if total >= n_tokens:
            break
        taken.append(text)
        total += len(tokens.tokenise(handle, text).ids)
    return taken


def _sampled(handle: ModelHandle, domain: str, half: Half) -> list[str]:
    """The shipped or prepared texts of `half`: one row in two."""
    rows = _rows(_folder(handle) / f"{domain}.jsonl")[0 if half == "calibrate" else 1 :: 2]
    if domain == "prose":
        return [row["text"] for row in rows]
    return [chat_prompt(handle, row["prompt"]) + row["text"] for row in rows]


def chat_prompt(handle: ModelHandle, prompt: str) -> str:
    """One instruction as the model is asked it: through its chat template, or as a question where it has none."""
    return handle.chat(prompt) if handle.tokenizer.chat_template else f"Question: {prompt}\nAnswer: "


def _folder(handle: ModelHandle) -> Path:
    """Text prepared for this model by `guardedit stats control`, else the text that ships: it suits any model."""
    prepared = prepared_folder(handle)
    return prepared if prepared.is_dir() else _shipped()


def prepared_folder(handle: ModelHandle) -> Path:
    """Where `make_control` puts a model's own control text by default."""
    return cache_folder() / "control" / hashlib.sha256(handle.name.encode()).hexdigest()[:16]


def _shipped() -> Path:
    return Path(str(files("guardedit") / "assets" / "smollm2-135m" / "control"))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; raises MissingStatisticsError where it cannot be read."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise MissingStatisticsError(
            f"the control text {path.name} cannot be read ({error}); make it with `guardedit stats control`"
        ) from error


def _python(half: Half) -> Iterator[str]:
    """Pieces of standard library source, cut at line ends."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in PYTHON_FILES[half]:
        path = root / f"{name}.py"
        # Modules come and go between Python versions; what was read is in the digest.
        if path.is_file():
            yield from _pieces(path.read_text(encoding="utf-8"))


def _pieces(source: str) -> Iterator[str]:
    piece = ""
    for line in source.splitlines(keepends=True):
        piece += line
        if len(piece) >= _PIECE:
            yield piece
            piece = ""
    if len(piece) >= _PIECE // 4:
        yield piece


def _arithmetic(seed: int, half: Half) -> Iterator[str]:
    """Endless short worksheets; a line belongs to one half by the parity of its hash, so halves share no line."""
    draw = random.Random(f"arithmetic/{seed}")
    parity = 0 if half == "calibrate" else 1
    while True:
        lines: list[str] = []
        while len(lines) < 8:
            line = _sum(draw)
            if hashlib.sha256(line.encode()).digest()[0] % 2 == parity:
                lines.append(line)
        yield "\n".join(lines) + "\n"


def _sum(draw: random.Random) -> str:
    a, b = draw.randint(2, 99), draw.randint(2, 99)
    kind = draw.randrange(4)
    if kind == 0:
        return f"{a} + {b} = {a + b}"
    if kind == 1:
        return f"{a + b} - {b} = {a}"
    if kind == 2:
        return f"{a} * {b % 12 + 1} = {a * (b % 12 + 1)}"
    return f"If one box holds {b} apples, then {a} boxes hold {a * b} apples."


def relations() -> tuple[dict[str, Any], ...]:
    """The shipped table of relations: `name`, `ids` (other names), `prompts` (stems), `pairs` (subject -> object)."""
    return tuple(json.loads((files("guardedit") / "assets" / "probes" / "relations.json").read_text("utf-8")))


def next_tokens(handle: ModelHandle, prompts: Sequence[str], batch_size: int = 32) -> list[int]:
    """The most likely next token of each prompt, in the order given."""
    import torch

    found: list[int] = []
    for start in range(0, len(prompts), batch_size):
        batch = handle.encode(prompts[start : start + batch_size])
        mask = batch["attention_mask"].bool()
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        with torch.no_grad():
            logits = handle.logits_at(handle.hidden(batch["input_ids"], batch["attention_mask"]), last)
        found += [int(token) for token in logits.argmax(-1)]
    return found
