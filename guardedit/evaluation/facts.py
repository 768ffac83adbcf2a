"""Facts to trace: of a file, or the well-known ones that ship with the package; and which of them a model knows."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.control import relations
from guardedit.models.handle import ModelHandle
from guardedit.models.tracing import Fact
from guardedit.records import digest_of, digest_of_bytes


@dataclass(frozen=True)
class FactList:
    """Facts with their answers, in the order of their source."""

    name: str
    digest: str
    facts: tuple[Fact, ...]

    @property
    def subjects(self) -> tuple[str, ...]:
        """Every subject once: what the noise level of causal tracing is taken from."""
        return tuple(dict.fromkeys(fact.subject for fact in self.facts))


def read_facts(path: Path, split: str | None = None) -> FactList:
    """Facts of a file that `read_cases` reads, or of one in the form of ROME's `known_1000` (JSON lines).

    Raises BadRequestError for a file that is not there or holds no usable fact.
    """
    if not path.is_file():
        raise BadRequestError(f"there is no data file {path}; give a .json, .jsonl or .jsonl.xz file")
    known = _known_form(path)
    if known is not None:
        return FactList(path.name, digest_of_bytes(path.read_bytes()), known)
    found = read_cases(path, split)
    cases = [case for case in found.cases if case.request.target_true]
    facts = tuple(Fact(c.request.subject, c.request.prompt, c.request.target_true) for c in cases)
    return FactList(found.name if split is None else f"{found.name}, split {split}", found.digest, facts)


def well_known() -> FactList:
    """The facts of the shipped table of relations, each behind its relation's first prompt."""
    table = relations()
    facts = tuple(
        Fact(subject, row["prompts"][0], answer) for row in table for subject, answer in row["pairs"].items()
    )
    return FactList("well-known facts that ship with guardedit", digest_of(list(table)), facts)


def known_facts(handle: ModelHandle, facts: Iterable[Fact], block: int = 32) -> Iterator[tuple[int, Fact]]:
    """(facts looked at so far, fact) for each fact whose answer the model says by itself, decoding greedily."""
    seen = 0
    for chunk in _chunks(facts, block):
        scores = score_pairs(handle, [(fact.filled, fact.answer or "") for fact in chunk])
        for fact, score in zip(chunk, scores, strict=True):
            seen += 1
            if score.greedy:
                yield seen, fact


def _chunks(facts: Iterable[Fact], size: int) -> Iterator[list[Fact]]:
    chunk: list[Fact] = []
    for fact in facts:
        chunk.append(fact)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _known_form(path: Path) -> tuple[Fact, ...] | None:
    """Facts of a `known_1000` file (subject, prompt with the subject in it, attribute); None for any other form."""
    records = _records(path)
    if not records or not {"subject", "prompt", "attribute"} <= records[0].keys():
        return None
    found = [_known_fact(record) for record in records]
    return tuple(fact for fact in found if fact is not None)


def _known_fact(record: dict[str, Any]) -> Fact | None:
    subject, prompt, answer = (str(record.get(key, "")) for key in ("subject", "prompt", "attribute"))
    stem = prompt.replace(subject, "{}", 1) if subject else ""
    return Fact(subject, stem, answer) if stem.count("{}") == 1 and answer.strip() else None


def _records(path: Path) -> Sequence[dict[str, Any]]:
    """Objects of a JSON or JSON-lines file; none where it is neither (which the case reader then says better)."""
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        if path.name.removesuffix(".xz").endswith(".json"):
            plain = json.loads(text)
        else:
            plain = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (lzma.LZMAError, UnicodeDecodeError, json.JSONDecodeError):
        return []
    if not isinstance(plain, list):
        return []
    return [record for record in plain if isinstance(record, dict)]
