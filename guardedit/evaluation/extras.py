"""Measurements that cost more than a look at the record's own prompts, and are asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from guardedit.errors import BadRequestError
from guardedit.evaluation.ability import Battery, measure
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.far import FarText
from guardedit.evaluation.filling import with_distractors, with_free_text, with_subject_stems
from guardedit.evaluation.measuring import as_it_is
from guardedit.evaluation.methods import Session
from guardedit.models.handle import ModelHandle

EXTRAS: dict[str, str] = {
    "distractors": "neighborhood with the edited fact stated before, where the file has no such prompts",
    "subject": "prompts about the same subject and another relation",
    "generated": "greedy answers beside the teacher-forced ones",
    "fluency": "texts of 100 tokens",
    "far": "control text: KL and perplexity",
    "ability": "arithmetic, syllogisms and, with their files, minimal pairs and held-out text",
}
"""Name -> what it adds."""
ALL = "all"

Progress = Callable[[str, int, int], None]


def extras_named(names: Iterable[str]) -> tuple[str, ...]:
    """The named extras in a fixed order, "all" spelled out. Raises BadRequestError for an unknown one."""
    given = set(names)
    unknown = sorted(given - {*EXTRAS, ALL})
    if unknown:
        raise BadRequestError(
            f"there is nothing called {unknown[0]!r} to measure; choose from {', '.join(EXTRAS)}, all"
        )
    return tuple(name for name in EXTRAS if name in given or ALL in given)


def filled(
    handle: ModelHandle, cases: Sequence[EvalCase], extras: Sequence[str], progress: Progress | None = None
) -> list[EvalCase]:
    """The cases with the prompts that the extras need and their records do not name."""
    found: list[EvalCase] = []
    for number, case in enumerate(cases, start=1):
        if "distractors" in extras:
            case = with_distractors(case)
        if "subject" in extras or ("fluency" in extras and not case.generation):
            case = with_subject_stems(handle, case)
        if "fluency" in extras:
            case = with_free_text(case)
        if "subject" not in extras:
            case = case.model_copy(update={"same_subject": ()})
        found.append(case if "fluency" in extras else case.model_copy(update={"generation": ()}))
        if progress is not None:
            progress("making prompts", number, len(cases))
    return found


@dataclass(frozen=True)
class WholeModel:
    """Figures of the model as a whole; the unedited side is computed once and kept."""

    handle: ModelHandle
    far_text: FarText | None = None
    battery: Battery | None = None

    @cached_property
    def unedited(self) -> dict[str, tuple[float, ...]]:
        """What the battery gives on the model as it is when this is first read."""
        return measure(self.handle, self.battery, as_it_is) if self.battery is not None else {}

    def __call__(self, session: Session | None) -> dict[str, tuple[float, ...]]:
        """Figures under the session's edits, or of the unedited model.

        Far text is not measured where a method puts prompts differently: its words have no place before a text.
        """
        if session is None:
            return self.unedited
        moves = {}
        if self.far_text is not None and not session.rewrites_prompts:
            moves = self.far_text.moves(session)
        abilities = measure(self.handle, self.battery, session.ask) if self.battery is not None else {}
        return {**moves, **abilities}
