"""Every prompt that one case is looked at with, in every variant, and how the answers are put back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from guardedit.evaluation.cases import HOLDS, EvalCase
from guardedit.evaluation.methods import Ask
from guardedit.evaluation.metrics import KINDS, PromptScore, QuestionScore
from guardedit.evaluation.scoring import Layout, TargetScore, lay_out
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

MAX_ANSWERS = 4
"""Accepted answers of a question that are scored token by token; generated text is compared with all of them."""

Put = Callable[[ModelHandle, str, str], str]


def _repeated(handle: ModelHandle, asked: str, stem: str) -> str:
    # A question is answered, a sentence stem is continued.
    return handle.chat(asked) + ("" if stem.rstrip().endswith("?") else stem)


VARIANTS: dict[str, Put] = {
    "raw": lambda handle, asked, stem: asked,
    "chat": _repeated,
    "chat-bare": lambda handle, asked, stem: handle.chat(asked),
}
"""How a stem is put to the model: as it is; as a user's message whose sentence the assistant has begun to repeat, so
that the target is its continuation (a question is not repeated); as a user's message, the target being the whole
answer. The second argument is the stem with what a method puts before it."""


@dataclass(frozen=True)
class Asked:
    """One stem in one variant, and the targets that are scored after it."""

    variant: str
    kind: str
    stem: str
    targets: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    """Answers that generated text is searched for."""


@dataclass(frozen=True)
class Sheet:
    """Everything that is asked about one case, in a fixed order."""

    case: EvalCase
    variants: tuple[str, ...]
    generated: bool
    """Whether answers are generated, too."""

    @cached_property
    def paired(self) -> tuple[Asked, ...]:
        """Stems with the new and the old target."""
        case = self.case
        stems: dict[str, Sequence[tuple[str, EditRequest]]] = {
            "rewrite": [(request.filled, request) for request in case.requests],
            "paraphrase": [(stem, case.request) for stem in case.paraphrases],
            "neighborhood": [(stem, case.request) for stem in case.neighborhood],
            "distractor_neighborhood": [(stem, case.request) for stem in case.distractors],
            "attribute": [(stem, case.request) for stem in case.attributes],
        }
        return tuple(
            Asked(variant, kind, stem, (r.target_new, r.target_true or ""), (r.target_new,))
            for variant in self.variants
            for kind in KINDS
            for stem, r in stems[kind]
        )

    @cached_property
    def questions(self) -> tuple[Asked, ...]:
        """Questions with answers of their own."""
        return tuple(
            Asked(variant, question.group, question.prompt, question.answers[:MAX_ANSWERS], question.answers)
            for variant in self.variants
            for question in self.case.questions
        )

    @cached_property
    def watched(self) -> tuple[Asked, ...]:
        """Stems whose next-token distribution the edit must leave alone."""
        held = {name: [q.prompt for q in self.case.questions if q.group == name] for name in HOLDS}
        stems: dict[str, Sequence[str]] = {
            "neighborhood": self.case.neighborhood,
            "distractor_neighborhood": self.case.distractors,
            "same_subject": self.case.same_subject,
            **held,
        }
        return tuple(Asked(v, kind, stem) for v in self.variants for kind in stems for stem in stems[kind])

    @cached_property
    def spoken(self) -> tuple[Asked, ...]:
        """What greedy text is generated after: the edited prompt, its other wordings, and the questions."""
        if not self.generated:
            return ()
        edited = (asked for asked in self.paired if asked.kind in ("rewrite", "paraphrase"))
        return (*edited, *(asked for asked in self.questions if asked.accepted))

    def layout(self, handle: ModelHandle, ask: Ask, batch_size: int) -> Layout:
        """All targets and all watched stems, put as `ask` puts them."""
        scored = [*self.paired, *self.questions]
        pairs = [(put(handle, asked, ask), target) for asked in scored for target in asked.targets]
        ends = [put(handle, asked, ask) for asked in self.watched]
        return lay_out(handle, pairs, batch_size, ends)


def put(handle: ModelHandle, asked: Asked, ask: Ask) -> str:
    """The text that the model reads."""
    return VARIANTS[asked.variant](handle, ask(asked.stem), asked.stem)


def paired_scores(
    sheet: Sheet, targets: Sequence[TargetScore]
) -> dict[str, dict[str, tuple[PromptScore, ...]]]:
    """Variant -> kind -> scores, from the layout's flat list, which begins with two targets a stem."""
    found: dict[str, dict[str, list[PromptScore]]] = {variant: {} for variant in sheet.variants}
    for at, asked in enumerate(sheet.paired):
        score = PromptScore(new=targets[2 * at], true=targets[2 * at + 1])
        found[asked.variant].setdefault(asked.kind, []).append(score)
    return {v: {kind: tuple(scores) for kind, scores in kinds.items()} for v, kinds in found.items()}


def question_scores(
    sheet: Sheet, targets: Sequence[TargetScore], said: Mapping[Asked, str]
) -> dict[str, tuple[QuestionScore, ...]]:
    """Variant -> scores of the questions, whose targets follow those of the paired stems."""
    found: dict[str, list[QuestionScore]] = {variant: [] for variant in sheet.variants}
    rest = iter(targets[2 * len(sheet.paired) :])
    for asked in sheet.questions:
        scores = [next(rest) for _ in asked.targets]
        found[asked.variant].append(
            QuestionScore(
                group=asked.kind,
                exact=any(score.greedy for score in scores) if scores else None,
                matched=scores[0].matched if scores else None,
                generated=holds(said[asked], asked.accepted) if asked in said else None,
            )
        )
    return {variant: tuple(scores) for variant, scores in found.items()}


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether the words of one of the answers stand in the text in a row, whatever their case and the marks between."""
    spoken = f" {' '.join(_plain(text))} "
    return any(f" {words} " in spoken for answer in answers if (words := " ".join(_plain(answer))))


def _plain(text: str) -> Iterator[str]:
    """Words in small letters, without marks."""
    word = ""
    for letter in f"{text.casefold()} ":
        if letter.isalnum():
            word += letter
        elif word:
            yield word
            word = ""
