"""Read editing benchmarks into cases: what to edit, and the prompts that are looked at before and after.

A reader is one entry of `READERS`: it says which records are its own, and turns one into an `EvalCase`. A record that
cannot be used is left out and listed with its reason; a file in which nothing can be used is an error.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.evaluation import forms
from guardedit.evaluation.cases import CaseSet, EvalCase
from guardedit.evaluation.filling import choose, with_neighbours, without
from guardedit.models.control import Fact
from guardedit.records import digest_of_bytes

__all__ = [
    "READERS", "CaseSet", "EvalCase", "Reader", "choose", "control_facts", "read_cases", "with_neighbours", "without",
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One data format."""

    fits: Callable[[dict[str, Any]], bool]
    parse: Callable[[dict[str, Any]], EvalCase]


READERS: dict[str, Reader] = {
    "mquake": Reader(lambda r: isinstance(r.get("requested_rewrite"), list), forms.mquake),
    "counterfact": Reader(lambda r: isinstance(r.get("requested_rewrite"), dict), forms.rome),
    "zsre-mend": Reader(lambda r: "src" in r and "alt" in r, forms.zsre_mend),
    "halluedit": Reader(lambda r: "question" in r and "object" in r and "topic" in r, forms.halluedit),
    "knowedit": Reader(
        lambda r: "target_new" in r and ("locality" in r or "portability" in r), forms.knowedit
    ),
    "counterfact-short": Reader(lambda r: "ground_truth" in r and "rephrase_prompt" in r, forms.short),
}
"""Form -> reader; the first one that fits the file's first record is taken."""


def read_cases(path: Path, split: str | None = None) -> CaseSet:
    """Cases of a `.json` (one list), `.jsonl` or either with `.xz`; `split` keeps that split only.

    Raises BadRequestError for a file that is not there, not JSON, in no known form, or without a usable case.
    """
    if not path.is_file():
        raise BadRequestError(f"there is no data file {path}; give a .json, .jsonl or .jsonl.xz file")
    data = path.read_bytes()
    records = list(_records(path, data))
    form = _form(records, path)
    cases, left_out = _parse(records, READERS[form])
    kept = tuple(case for case in cases if split is None or case.split == split)
    if not kept:
        splits = sorted({case.split for case in cases if case.split is not None})
        why = f"split {split!r} (there are {splits})" if cases else f"{left_out[0][0]}: {left_out[0][1]}"
        raise BadRequestError(f"{path.name} has no usable case; {why}")
    return CaseSet(path.name, form, digest_of_bytes(data), kept, tuple(left_out))


def control_facts(path: Path, limit: int, seed: int = 0) -> tuple[Fact, ...]:
    """Facts of a data file for control text, `limit` of them in an order that `seed` decides, asked of no model yet.

    Raises BadRequestError as `read_cases` does.
    """
    cases = [case for case in choose(read_cases(path).cases, seed) if case.target_true]
    return tuple(
        Fact(one.subject, one.prompt, one.target_true or "", one.relation or one.prompt, known=False)
        for one in (case.request for case in cases[:limit])
    )


def _records(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each record."""
    try:
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        if path.name.removesuffix(".xz").endswith(".json"):
            entries = [(f"record {i}", entry) for i, entry in enumerate(json.loads(text), start=1)]
        else:
            # Not splitlines: JSON may hold other line separators, U+2028 for one, inside a string.
            lines = enumerate(text.split("\n"), start=1)
            entries = [(f"line {i}", json.loads(line)) for i, line in lines if line.strip()]
    except (lzma.LZMAError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise BadRequestError(f"{path.name} cannot be read as JSON records: {error}") from error
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise BadRequestError(f"{path.name} {where} is a {type(entry).__name__}; a record is an object")
        yield where, entry


def _form(records: list[tuple[str, dict[str, Any]]], path: Path) -> str:
    if not records:
        raise BadRequestError(f"{path.name} is empty")
    for name, reader in READERS.items():
        if reader.fits(records[0][1]):
            return name
    fields = ", ".join(sorted(records[0][1])[:8])
    raise BadRequestError(
        f"{path.name} is in no form that is known ({', '.join(READERS)}); its fields are {fields}"
    )


def _parse(
    records: list[tuple[str, dict[str, Any]]], reader: Reader
) -> tuple[list[EvalCase], list[tuple[str, str]]]:
    cases, left_out = [], []
    for where, record in records:
        try:
            # Files that number no cases are numbered by their records.
            cases.append(reader.parse({"case_id": where.split()[-1], **record}))
        except KeyError as error:
            left_out.append((where, f"field {error} is missing"))
        except (BadRequestError, ValueError, TypeError, AttributeError) as error:
            left_out.append((where, str(error).splitlines()[0]))
    return cases, left_out
