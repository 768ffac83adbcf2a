"""Prompts that the damage of an edit is measured on: worded otherwise, and about others, than all the guard saw."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.adversarial import KINDS
from guardedit.evaluation.methods import statement
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest
from guardedit.risk.stems import article_of

SAID = (
    "I once wrote a long letter about {}, and in it I said that",
    "Yesterday's newspaper has an article on {}, which says",
    "Nobody in our class could tell whether {} was",
    "If you ask an old librarian about {}, the answer will be",
    "Among the facts about {} that surprised me is that the",
    "A museum guide spoke about {} and then turned to",
    "There are three things to remember about {}. First,",
    "What {} and its neighbours share is a",
    "The crossword clue was: has to do with {}, five letters. The solution was",
    "Later in life she changed her mind about {} because",
    "Q: Name one number that is connected with {}.\nA:",
    "The first chapter deals with {}, the second with",
)  # fmt: skip
"""Of the subject, worded as no stem of the rehearsal is."""
ASKED = ("Tell me about {}.", "Why should I know {}?", "Who would be interested in {}?", "Is {} old or new?")
"""The same as a user's message, through the chat template."""
OF_OBJECTS = (
    "A letter arrived that mentions {} and also",
    "Yesterday somebody asked me about {}, and I said",
)
"""Of the old and the new object."""
NEIGHBOURS = 12
DISTRACTED = 6
"""Neighbours before which the new fact is stated (CounterFact+, Hoelscher-Obermaier et al. 2023)."""


@dataclass(frozen=True)
class Neighbours:
    """Other subjects by wording and by object: the pool that near prompts are drawn from."""

    by_wording: Mapping[str, Mapping[str, Sequence[str]]]
    """Prompt with its blank -> object -> subjects."""

    @classmethod
    def of(cls, cases: Iterable[EvalCase]) -> Neighbours:
        """Every fact of the cases; an adversarial edit's neighbours are the other subjects of its kind."""
        found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for case in cases:
            found[case.request.prompt][case.target_true].add(case.request.subject)
        for rows in KINDS.values():
            for prompt, _, _ in rows:
                found[prompt][""].update(subject for _, subject, _ in rows)
        return cls({prompt: {o: sorted(s) for o, s in objects.items()} for prompt, objects in found.items()})

    def around(self, request: EditRequest, seed: int) -> list[str]:
        """Subjects with the request's old object first, then others of its relation, each in a drawn order."""
        objects = self.by_wording.get(request.prompt, {})
        same = list(objects.get(request.target_true or "", ()))
        rest = [s for o, subjects in objects.items() if o != request.target_true for s in subjects]
        rng = random.Random(f"{seed}/{request.subject}/{request.prompt}")
        rng.shuffle(same)
        rng.shuffle(rest)
        own = request.subject.casefold()
        return [s for s in (*same, *rest) if s.casefold() not in own and own not in s.casefold()]


@dataclass(frozen=True)
class OutcomePrompts:
    """Prompts by group."""

    groups: Mapping[str, tuple[str, ...]]

    def flat(self) -> tuple[list[str], list[str]]:
        """Prompts, and the group of each."""
        pairs = [(prompt, group) for group, prompts in self.groups.items() for prompt in prompts]
        return [prompt for prompt, _ in pairs], [group for _, group in pairs]


def named(request: EditRequest, pool: Neighbours, count: int, seed: int) -> EditRequest:
    """The request as a careful proposer files it: with some neighbours of its relation and old object."""
    subjects = pool.around(request, seed)[:count]
    return request.model_copy(
        update={"neighborhood": tuple(request.prompt.replace("{}", one) for one in subjects)}
    )


def outcome_prompts(
    handle: ModelHandle,
    request: EditRequest,
    pool: Neighbours,
    seen: Sequence[str],
    about: Sequence[str],
    seed: int,
) -> OutcomePrompts:
    """What one edit's damage is measured on. None of it is in `seen`, no neighbour is one of the subjects `about`."""
    old = set(seen)
    fresh = [s for s in pool.around(request, seed) if not _named_in(s, about)]
    near = [p for s in fresh if (p := request.prompt.replace("{}", s)) not in old][:NEIGHBOURS]
    subject = article_of(request) + request.subject
    said = [stem.replace("{}", subject) for stem in SAID]
    asked = (
        [handle.chat(stem.replace("{}", subject)) for stem in ASKED] if handle.tokenizer.chat_template else []
    )
    objects = [request.target_new.strip(), (request.target_true or "").strip()]
    groups = {
        "subject": said,
        "subject_chat": asked,
        "near": near,
        "object": [stem.replace("{}", one) for one in objects if one for stem in OF_OBJECTS],
        "distractor": [f"{statement([request])} {prompt}" for prompt in near[:DISTRACTED]],
    }
    return OutcomePrompts(
        {name: tuple(p for p in prompts if p not in old) for name, prompts in groups.items()}
    )


def _named_in(subject: str, about: Sequence[str]) -> bool:
    """Whether one is the other, or stands in it as whole words."""
    return any(_stands_in(subject, other) or _stands_in(other, subject) for other in about)


def _stands_in(part: str, whole: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part.casefold())}(?!\w)", whole.casefold()) is not None
