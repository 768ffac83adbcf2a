"""Facts to tune on: of a data file, or well-known ones that ship with the package; of those, what the model knows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError
from guardedit.evaluation.filling import with_neighbours
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.control import relations
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, digest_of

NEIGHBOURS = 5


@dataclass(frozen=True)
class TuneCase:
    """One edit, with other wordings and with neighbours; an editor is given the request alone."""

    case_id: str
    request: EditRequest
    paraphrases: tuple[str, ...]
    neighborhood: tuple[str, ...]


@dataclass(frozen=True)
class TuneCases:
    """Cases and where they are from."""

    name: str
    digest: str
    cases: tuple[TuneCase, ...]


def shipped_cases() -> TuneCases:
    """Well-known facts of the shipped table of relations whose object others share, so that they have neighbours."""
    table = relations()
    cases = tuple(case for row in table for case in _of_relation(row))
    return TuneCases("well-known facts that ship with guardedit", digest_of(list(table)), cases)


def _of_relation(row: dict[str, Any]) -> Iterator[TuneCase]:
    pairs, (prompt, *others) = row["pairs"], row["prompts"]
    objects = sorted(set(pairs.values()))
    for subject, answer in pairs.items():
        near = [prompt.replace("{}", s) for s, o in pairs.items() if o == answer and s != subject]
        new = [other for other in objects if other != answer]
        if near and new and others:
            target = random.Random(f"{row['name']}/{subject}").choice(new)
            request = EditRequest(
                subject=subject, prompt=prompt, target_new=target, target_true=answer, relation=row["name"]
            )
            wordings = tuple(other.replace("{}", subject) for other in others)
            yield TuneCase(f"{row['name']}/{subject}", request, wordings, tuple(near[:NEIGHBOURS]))


def cases_of_file(path: Path, split: str | None = None) -> TuneCases:
    """Cases of a file that `read_cases` reads, neighborhoods filled up from the same split."""
    found = read_cases(path, split)
    filled = with_neighbours(found.cases, NEIGHBOURS, found.cases)
    cases = tuple(
        TuneCase(case.case_id, case.request, tuple(case.paraphrases), tuple(case.neighborhood))
        for case in filled
        if case.request.target_true and case.paraphrases and case.neighborhood
    )
    name = found.name if split is None else f"{found.name}, split {split}"
    return TuneCases(name, found.digest, cases)


def known_cases(
    handle: ModelHandle, cases: Sequence[TuneCase], limit: int, seed: int
) -> tuple[TuneCase, ...]:
    """The first `limit` cases, in an order that `seed` decides, whose true object greedy decoding begins with.

    Raises BadRequestError where the model knows fewer than two.
    """
    order = sorted(cases, key=lambda case: case.case_id)
    random.Random(seed).shuffle(order)
    taken: list[TuneCase] = []
    for at in range(0, len(order), 32):
        block = order[at : at + 32]
        scores = score_pairs(handle, [(c.request.filled, c.request.target_true or "") for c in block])
        taken += [case for case, score in zip(block, scores, strict=True) if score.greedy]
        if len(taken) >= limit:
            break
    if len(taken) < 2:
        raise BadRequestError(
            f"{handle.name} knows {len(taken)} of the {len(order)} facts to tune on; name a file of others"
        )
    return tuple(taken[:limit])
