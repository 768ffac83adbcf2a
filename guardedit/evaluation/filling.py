"""What a case does not name is filled in: neighbours from the same file, distractors, stems and old answers by rule."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from guardedit.errors import BadRequestError
from guardedit.evaluation.cases import CaseSet, EvalCase
from guardedit.evaluation.methods import statement
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest
from guardedit.risk.neighbours import ProbeSizes, generated_probes

SAME_SUBJECT = 8
"""Stems about the subject and another relation, a case."""
FREE_TEXTS = 4
"""Stems that free text is generated from, a case, at most."""
_ANSWERS = 50  # candidates for the old answer of a fact without one
_BLOCK = 32


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
    return [
        _filled_up(case, count, stems[(case.request.prompt, case.target_true)], seed)
        if case.target_true
        else case
        for case in cases
    ]


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


def with_distractors(case: EvalCase) -> EvalCase:
    """The edited fact before each neighborhood prompt, where the record names no distracting prompts of its own."""
    if case.distractors:
        return case
    fact = statement(case.requests)
    return case.model_copy(update={"distractors": tuple(f"{fact} {stem}" for stem in case.neighborhood)})


def with_subject_stems(handle: ModelHandle, case: EvalCase, count: int = SAME_SUBJECT) -> EvalCase:
    """Stems about the subject and another relation: those of the record, filled up to `count` by the rules of
    `guardedit.risk.neighbours`, which ask the unedited model which of them ask for the edited relation."""
    named = case.request.model_copy(update={"same_subject": case.same_subject[:count]})
    sizes = ProbeSizes(subject=count, near=0, entailed=0, target=1)
    return case.model_copy(update={"same_subject": generated_probes(handle, named, sizes).subject})


def with_free_text(case: EvalCase) -> EvalCase:
    """Stems to generate from: the record's, else the edited prompt and some about the subject."""
    stems = case.generation or (case.request.filled, *case.same_subject)
    return case.model_copy(update={"generation": stems[:FREE_TEXTS]})


def with_old_answers(handle: ModelHandle, cases: Sequence[EvalCase]) -> list[EvalCase]:
    """Facts whose record names no old answer get today's: the likeliest word that is no beginning of the new target."""
    asked = [request for case in cases for request in case.requests if request.target_true is None]
    found = dict(zip(asked, _old_answers(handle, asked), strict=True))

    def filled(request: EditRequest) -> EditRequest:
        return request.model_copy(update={"target_true": found[request]}) if request in found else request

    return [
        case.model_copy(update={"request": filled(case.request), "more": tuple(map(filled, case.more))})
        for case in cases
    ]


def _old_answers(handle: ModelHandle, requests: Sequence[EditRequest]) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(requests), _BLOCK):
        block = requests[start : start + _BLOCK]
        with preserved(handle), torch.no_grad():
            batch = handle.encode([request.filled for request in block])
            mask = batch["attention_mask"].bool()
            last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
            logits = handle.logits_at(handle.hidden(batch["input_ids"], batch["attention_mask"]), last)
        top = logits.topk(min(_ANSWERS, logits.shape[-1])).indices.tolist()
        answers += [_first_word(handle, request, ids) for request, ids in zip(block, top, strict=True)]
    return answers


def _first_word(handle: ModelHandle, request: EditRequest, ids: Sequence[int]) -> str:
    new = request.target_new.strip().casefold()
    for token in ids:
        word = str(handle.tokenizer.decode([token])).strip()
        if word[:1].isalnum() and not new.startswith(word.casefold()):
            return word
    raise BadRequestError(f"the model has no answer to {request.filled!r}; name the old answer in the record")
