"""What one case of a benchmark holds: what to edit, and the prompts that are looked at before and after."""

from __future__ import annotations

from dataclasses import dataclass

from guardedit.records import Digest, EditRequest, Record

FOLLOWS = (
    "one_hop",
    "reasoning",
    "subject_aliasing",
    "logical_generalization",
    "inverse_relation",
    "multi_hop",
)
"""Groups of questions whose answer follows from the edit: together they are `portability`."""
HOLDS = ("relation_specificity", "forgetfulness", "unrelated_relation", "unrelated_question")
"""Groups whose answer the edit must leave alone: together they are `locality`."""
WORDINGS = ("multi_hop",)
"""Groups whose prompts are wordings of one question: it is answered if any of them is (Zhong et al. 2023)."""


class Question(Record):
    """A prompt with an answer of its own."""

    group: str
    """One of FOLLOWS or HOLDS."""
    prompt: str
    answers: tuple[str, ...]
    """Accepted answers, the one that is scored token by token first; none where only a change is looked for."""


class EvalCase(Record):
    """One edit and its evaluation prompts, all of them complete stems."""

    case_id: str
    request: EditRequest
    """The edit alone, without any of the prompts below: an editor must not see what it is measured on."""
    more: tuple[EditRequest, ...] = ()
    """Further edits that belong to the same case (MQuAKE)."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings of `request`."""
    neighborhood: tuple[str, ...] = ()
    """Other subjects of the same relation whose true answer is the request's `target_true`."""
    distractors: tuple[str, ...] = ()
    """Neighborhood prompts with the edited fact before them (CounterFact+, Hoelscher-Obermaier et al. 2023)."""
    attributes: tuple[str, ...] = ()
    """Other subjects of the same relation whose true answer is the request's `target_new`."""
    questions: tuple[Question, ...] = ()
    same_subject: tuple[str, ...] = ()
    """Stems about the subject and another relation."""
    generation: tuple[str, ...] = ()
    """Stems that free text is generated from."""
    references: tuple[str, ...] = ()
    """Texts about the new object, which generated text should resemble."""
    split: str | None = None

    @property
    def target_true(self) -> str:
        """The old answer; "" where the record names none."""
        return self.request.target_true or ""

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """Every edit of the case."""
        return (self.request, *self.more)


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
