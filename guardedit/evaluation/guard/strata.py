"""Which edits the guard is tried on, fixed before the first one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from guardedit.errors import BadRequestError
from guardedit.evaluation.cases import CaseSet, EvalCase
from guardedit.evaluation.filling import choose
from guardedit.evaluation.guard.adversarial import KINDS, adversarial
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.handle import ModelHandle

KNOWN, UNKNOWN, ADVERSARIAL = "known", "unknown", "adversarial"
STRATA = (KNOWN, UNKNOWN, ADVERSARIAL)
_BLOCK = 64


@dataclass(frozen=True)
class Chosen:
    """One edit to try."""

    stratum: str
    """`known`, `unknown`, or a kind of adversarial edit."""
    case: EvalCase


def chosen_edits(
    handle: ModelHandle, case_set: CaseSet, stratum: str, count: int, seed: int = 0
) -> Iterator[Chosen]:
    """The first `count` edits of a stratum, in an order that the seed decides.

    Natural facts are those of the data file, apart by whether greedy decoding of the prompt begins with the old object
    (`known`) or not (`unknown`). Raises BadRequestError for a stratum that does not exist.
    """
    if stratum not in STRATA:
        raise BadRequestError(f"stratum {stratum!r} does not exist; choose from {', '.join(STRATA)}")
    if stratum == ADVERSARIAL:
        found = [Chosen(kind, case) for kind, case in adversarial()]
        # A prefix of the list shall hold every kind.
        turns = [one for i in range(len(found)) for one in found if one.case.case_id.endswith(f"-{i:02d}")]
        yield from turns[:count]
        return
    wanted: Callable[[bool], bool] = (lambda known: known) if stratum == KNOWN else (lambda known: not known)
    left = count
    cases = [case for case in choose(case_set.cases, seed) if case.target_true]
    for start in range(0, len(cases), _BLOCK):
        block = cases[start : start + _BLOCK]
        for case, known in zip(block, _known(handle, block), strict=True):
            if left and wanted(known):
                left -= 1
                yield Chosen(stratum, case)
        if not left:
            return


def kinds() -> tuple[str, ...]:
    """Every value of a row's `stratum`."""
    return (KNOWN, UNKNOWN, *KINDS)


def _known(handle: ModelHandle, cases: list[EvalCase]) -> list[bool]:
    pairs = [(case.request.filled, case.target_true) for case in cases]
    return [found.greedy for found in score_pairs(handle, pairs)]
