"""Make a model's own control text: sampled prose and chat, and facts with the model's word on which it knows.

The text that ships was made by `make_control(load("smollm2-135m"), folder)`; command: `guardedit stats control`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from guardedit.models import tokens
from guardedit.models.control import Fact, chat_prompt, next_tokens, prepared_folder, relations
from guardedit.models.corpus import sample_texts
from guardedit.models.handle import ModelHandle, preserved

Progress = Callable[[str, int], None]
"""Told what is being made and how many pieces of it there are."""
Row = dict[str, Any]


def make_control(
    handle: ModelHandle,
    folder: Path | None = None,
    seed: int = 0,
    *,
    rounds: int = 2,
    length: int = 192,
    facts: Iterable[Fact] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Sample `prose.jsonl` and `chat.jsonl` from the model and ask it the facts; ten minutes on one core.

    Each of the opening phrases and instructions is continued `rounds` times by up to `length` tokens (temperature 0.8:
    at 1.0 a small model soon stops making sense). `facts` are asked instead of the shipped table's, which a model of
    another language or world does not know. The same seed gives the same files on the same machine. Returns the
    folder, by default the one that `control_texts` looks into for this model. The model is left as it was.
    """
    target = folder or prepared_folder(handle)
    prompts = json.loads(
        (files("guardedit") / "assets" / "probes" / "control_prompts.json").read_text("utf-8")
    )

    def teller(domain: str) -> Callable[[int], None]:
        return lambda n: progress(domain, n) if progress is not None else None

    with preserved(handle):
        prose = _sampled(handle, prompts["prose"] * rounds, length, seed, teller("prose"))
        _write(target / "prose.jsonl", [{"text": text} for text in prose])
        _write(
            target / "chat.jsonl", _chat(handle, prompts["chat"] * rounds, length, seed + 1, teller("chat"))
        )
        _write(target / "facts.jsonl", _facts(handle, facts, teller("facts")))
    return target


def _sampled(
    handle: ModelHandle, prompts: list[str], length: int, seed: int, tell: Callable[[int], None]
) -> list[str]:
    return sample_texts(
        handle, len(prompts), length, seed, prompts, temperature=0.8, batch_size=32, progress=tell
    )


def _chat(
    handle: ModelHandle, prompts: list[str], length: int, seed: int, tell: Callable[[int], None]
) -> list[Row]:
    rendered = [chat_prompt(handle, prompt) for prompt in prompts]
    texts = _sampled(handle, rendered, length, seed, tell)
    # The sampler decodes without special tokens, so the template's words stand in front of the reply.
    decode = handle.tokenizer.decode
    fronts = [decode(tokens.tokenise(handle, text).ids, skip_special_tokens=True) for text in rendered]
    pairs = zip(prompts, fronts, texts, strict=True)
    return [{"prompt": prompt, "text": text.removeprefix(front)} for prompt, front, text in pairs]


_FACT_RELATIONS = (
    "capital", "landmark_city", "located_in_country", "continent", "official_language", "currency", "chemical_symbol",
    "animal_young", "animal_sound", "color", "opposite", "author", "company_founder", "sport", "material",
    "part_of_year", "occupation", "citizenship", "manufacturer", "developer", "inventor", "religion",
)  # fmt: skip


def _facts(handle: ModelHandle, named: Iterable[Fact] | None, tell: Callable[[int], None]) -> list[Row]:
    """The named facts, or every pair of the plainer relations in the first wording that the model knows it in, else in
    the first one."""
    if named is not None:
        return [asdict(fact) for fact in _known_or_not(handle, list(named))]
    facts: list[Fact] = []
    for row in relations():
        if row["name"] in _FACT_RELATIONS:
            facts += _asked(handle, row)
            tell(len(facts))
    return [asdict(fact) for fact in facts]


def _asked(handle: ModelHandle, row: Row) -> list[Fact]:
    """The facts of one relation; wordings are tried in turn on the subjects that are not known yet."""
    found: dict[str, Fact] = {}
    for prompt in row["prompts"]:
        left = [(s, answer) for s, answer in row["pairs"].items() if s not in found or not found[s].known]
        tops = next_tokens(handle, [prompt.replace("{}", subject) for subject, _ in left])
        for (subject, answer), top in zip(left, tops, strict=True):
            known = _begins(answer, str(handle.tokenizer.decode([top])))
            if known or subject not in found:
                found[subject] = Fact(subject, prompt, answer, row["name"], known)
    return list(found.values())


def _known_or_not(handle: ModelHandle, facts: list[Fact]) -> list[Fact]:
    tops = next_tokens(handle, [fact.filled for fact in facts])
    words = (str(handle.tokenizer.decode([top])) for top in tops)
    return [replace(fact, known=_begins(fact.answer, word)) for fact, word in zip(facts, words, strict=True)]


def _begins(answer: str, token: str) -> bool:
    """Whether a token that is more than white space begins the answer."""
    word = token.strip().lower()
    return bool(word) and answer.lower().startswith(word)


def _write(path: Path, rows: list[Row]) -> None:
    """Write a JSONL file atomically and durably."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
