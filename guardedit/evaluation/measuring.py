"""One case on the unedited and on the edited model: the same rows, and what moved between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.drift.behaviour import compare
from guardedit.evaluation.asking import Asked, Sheet, holds, paired_scores, put, question_scores
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.fluency import consistency, fluency
from guardedit.evaluation.generation import ANSWER_TOKENS, continuations, texts
from guardedit.evaluation.methods import Ask, Session
from guardedit.evaluation.metrics import CaseScores, Move
from guardedit.evaluation.scoring import Layout, Scored, run
from guardedit.models.handle import ModelHandle


@dataclass(frozen=True)
class Probing:
    """What every case of a run is asked, and how."""

    variants: tuple[str, ...] = ("raw",)
    generated: bool = False
    """Generate answers, too."""
    free_text: bool = False
    """Generate texts, for fluency."""
    batch_size: int = 32
    seed: int = 0
    corpus: tuple[str, ...] = ()
    """References of all cases, which consistency counts words in."""


@dataclass(frozen=True, eq=False)
class Unedited:
    """The unedited side of one case, which edited sides are compared with."""

    sheet: Sheet
    scores: dict[str, CaseScores]
    """By variant."""
    layout: Layout
    ends: Float[Tensor, "n d_model"]


def as_it_is(prompt: str) -> str:
    """How a prompt is put while no edit is in force."""
    return prompt


def unedited_side(handle: ModelHandle, case: EvalCase, probing: Probing) -> Unedited:
    """Everything about the case on the model as it is."""
    sheet = Sheet(case, probing.variants, probing.generated)
    layout = sheet.layout(handle, as_it_is, probing.batch_size)
    scored = run(handle, layout)
    return Unedited(sheet, _scores(handle, sheet, scored, {}, as_it_is, probing), layout, scored.ends)


def edited_side(session: Session, before: Unedited, probing: Probing) -> dict[str, CaseScores]:
    """The same on the edited model, with what moved; in the same rows and batches where prompts are put as before."""
    handle, sheet = session.handle, before.sheet
    changed = session.rewrites_prompts
    layout = sheet.layout(handle, session.ask, probing.batch_size) if changed else before.layout
    scored = run(handle, layout)
    moves = _moves(session, sheet, before.ends, scored.ends)
    return _scores(handle, sheet, scored, moves, session.ask, probing)


def _scores(
    handle: ModelHandle,
    sheet: Sheet,
    scored: Scored,
    moves: Mapping[str, Mapping[str, tuple[Move, ...]]],
    ask: Ask,
    probing: Probing,
) -> dict[str, CaseScores]:
    said = _said(handle, sheet, ask)
    paired, questions = paired_scores(sheet, scored.targets), question_scores(sheet, scored.targets, said)
    written = _free_text(handle, sheet.case, ask, probing)
    return {
        variant: CaseScores.model_validate(
            {
                **paired[variant],
                "questions": questions[variant],
                "moves": moves.get(variant, {}),
                "said": _targets_said(variant, sheet, said),
                # Texts are generated once, from the stems as they are.
                **(written if variant == sheet.variants[0] else {}),
            }
        )
        for variant in sheet.variants
    }


def _said(handle: ModelHandle, sheet: Sheet, ask: Ask) -> dict[Asked, str]:
    prompts = [put(handle, asked, ask) for asked in sheet.spoken]
    written = continuations(handle, prompts, ANSWER_TOKENS) if prompts else []
    return dict(zip(sheet.spoken, written, strict=True))


def _targets_said(variant: str, sheet: Sheet, said: Mapping[Asked, str]) -> dict[str, tuple[bool, ...]]:
    found: dict[str, list[bool]] = {}
    for asked in sheet.paired:
        if asked.variant == variant and asked in said:
            found.setdefault(asked.kind, []).append(holds(said[asked], asked.accepted))
    return {kind: tuple(values) for kind, values in found.items()}


def _free_text(handle: ModelHandle, case: EvalCase, ask: Ask, probing: Probing) -> dict[str, object]:
    if not probing.free_text or not case.generation:
        return {}
    asked = [ask(stem) for stem in case.generation]
    found = texts(handle, asked, probing.seed)
    # What a method puts before a stem is no text of the model's.
    own = [
        stem + text.removeprefix(prompt)
        for stem, prompt, text in zip(case.generation, asked, found, strict=True)
    ]
    likeness = consistency(own, case.references, probing.corpus)
    return {"texts": tuple(own), "fluency": fluency(own), "consistency": likeness}


def _moves(
    session: Session, sheet: Sheet, before: Tensor, after: Tensor
) -> dict[str, dict[str, tuple[Move, ...]]]:
    """Variant -> kind -> moves, in the order of the stems."""
    found: dict[str, dict[str, list[Move]]] = {}
    for asked, move in zip(sheet.watched, next_token_moves(session, before, after), strict=True):
        found.setdefault(asked.variant, {}).setdefault(asked.kind, []).append(move)
    return {v: {kind: tuple(moves) for kind, moves in kinds.items()} for v, kinds in found.items()}


def next_token_moves(
    session: Session, before: Float[Tensor, "n d_model"], after: Float[Tensor, "n d_model"]
) -> Sequence[Move]:
    """Each pair of final hidden states as next-token distributions: KL over the whole vocabulary, and the likeliest."""
    if not len(before):
        return ()
    handle = session.handle
    heads = (session.reference_head, handle.model.get_submodule(handle.architecture.unembedding))
    nothing = torch.full((len(before),), -1, device=before.device)
    found = compare(before, after, heads, nothing, torch.arange(len(before)), handle.capped)
    kls = [float(value) for value in found.kl_nats]
    finite = after.isfinite().all(1).tolist()
    return tuple(
        Move(kl_nats=kl if math.isfinite(kl) else None, lost=bool(lost) or not whole)
        for kl, lost, whole in zip(kls, found.lost.tolist(), finite, strict=True)
    )
