"""Read editing benchmarks into cases: what to edit, and the prompts that are looked at before and after.

A reader is one entry of `READERS`: it says which records are its own, and turns one into an `EvalCase`. A record that
cannot be used is left out and listed with its reason; a file in which nothing can be used is an error.
"""

from __future__ import annotations

import json
import lzma
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.records import Digest, EditRequest, Record, digest_of_bytes


class EvalCase(Record):
    """One edit and its evaluation prompts, all of them complete stems."""

    case_id: str
    request: EditRequest
    """The edit alone, without any of the prompts below: an editor must not see what it is measured on."""
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    """Other subjects of the same relation whose true answer is the request's `target_true`."""
    distractors: tuple[str, ...] = ()
    """Neighborhood prompts with the edited fact before them (CounterFact+, Hoelscher-Obermaier et al. 2023)."""
    split: str | None = None

    @property
    def target_true(self) -> str:
        """The old answer, which every reader insists on."""
        return self.request.target_true or ""


@dataclass(frozen=True)
class CaseSet:
    """The cases of one file."""

    name: str
    form: str
    """Name of the reader."""
    digest: Digest
    """Of the file's bytes, as they lie on disk."""
    cases: tuple[EvalCase, ...]
    left_out: tuple[tuple[str, str], ...]
    """(where, why) of each record that could not be used."""


@dataclass(frozen=True)
class Reader:
    """One data format."""

    fits: Callable[[dict[str, Any]], bool]
    parse: Callable[[dict[str, Any]], EvalCase]


def _short(record: dict[str, Any]) -> EvalCase:
    """CounterFact's short form: the subject stands in the prompt; one paraphrase, one neighbour."""
    subject, prompt = record["subject"], record["prompt"]
    if subject not in prompt:
        raise BadRequestError(f"subject {subject!r} is not in prompt {prompt!r}")
    if record.get("locality_ground_truth", record["ground_truth"]) != record["ground_truth"]:
        raise BadRequestError(
            "the neighbour's answer is not the old object, so it cannot be scored against the new"
        )
    request = EditRequest(
        subject=subject,
        prompt=prompt.replace(subject, "{}", 1),
        target_new=record["target_new"],
        target_true=record["ground_truth"],
    )
    return EvalCase(
        case_id=str(record["case_id"]),
        request=request,
        paraphrases=(record["rephrase_prompt"],),
        neighborhood=(record["locality_prompt"],),
        split=record.get("split"),
    )


def _rome(record: dict[str, Any]) -> EvalCase:
    """CounterFact as ROME published it, with CounterFact+'s distracting prompts where they are there."""
    rewrite = record["requested_rewrite"]
    request = EditRequest(
        subject=rewrite["subject"],
        prompt=rewrite["prompt"],
        target_new=rewrite["target_new"]["str"],
        target_true=rewrite["target_true"]["str"],
        relation=rewrite.get("relation_id"),
    )
    return EvalCase(
        case_id=str(record["case_id"]),
        request=request,
        paraphrases=tuple(record.get("paraphrase_prompts", ())),
        neighborhood=tuple(record.get("neighborhood_prompts", ())),
        distractors=tuple(record.get("distracting_neighborhood_prompts", ())),
        split=record.get("split"),
    )


READERS: dict[str, Reader] = {
    "counterfact": Reader(lambda r: isinstance(r.get("requested_rewrite"), dict), _rome),
    "counterfact-short": Reader(lambda r: "ground_truth" in r and "rephrase_prompt" in r, _short),
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


def with_neighbours(
    cases: Sequence[EvalCase], count: int, pool: Sequence[EvalCase], seed: int = 0
) -> list[EvalCase]:
    """Fill each case's neighborhood up to `count` prompts, as ROME chose them: same relation, same old object.

    The relation is the prompt with its blank; prompts come from `pool`, never with the case's own subject in them.
    A case whose relation and object are rare keeps the fewer that there are.
    """
    stems: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in pool:
        stems[(case.request.prompt, case.target_true)].add(case.request.filled)
    return [_filled_up(case, count, stems[(case.request.prompt, case.target_true)], seed) for case in cases]


def choose(cases: Sequence[EvalCase], seed: int) -> list[EvalCase]:
    """All cases in an order that the seed decides and the file's order does not."""
    ordered = sorted(cases, key=lambda case: case.case_id)
    random.Random(seed).shuffle(ordered)
    return ordered


def without(case_set: CaseSet, subjects: set[str]) -> CaseSet:
    """The set without the cases about some subjects, e.g. those that a setting was tuned on."""
    kept = tuple(case for case in case_set.cases if case.request.subject not in subjects)
    return replace(case_set, cases=kept)


def _filled_up(case: EvalCase, count: int, stems: set[str], seed: int) -> EvalCase:
    fresh = sorted(s for s in stems if case.request.subject not in s and s not in case.neighborhood)
    random.Random(f"{seed}/{case.case_id}").shuffle(fresh)
    missing = max(0, count - len(case.neighborhood))
    return case.model_copy(update={"neighborhood": (*case.neighborhood, *fresh[:missing])})


def _records(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each record."""
    try:
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        if path.name.removesuffix(".xz").endswith(".json"):
            entries = [(f"record {i}", entry) for i, entry in enumerate(json.loads(text), start=1)]
        else:
            lines = enumerate(text.splitlines(), start=1)
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
            cases.append(reader.parse(record))
        except KeyError as error:
            left_out.append((where, f"field {error} is missing"))
        except (BadRequestError, ValueError, TypeError, AttributeError) as error:
            left_out.append((where, str(error).splitlines()[0]))
    return cases, left_out
