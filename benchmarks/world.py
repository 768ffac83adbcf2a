"""A generated world: invented people, towns and countries in functional relations, so that every ripple is known.

A fact is (relation, subject) -> object. Derived relations are compositions of others: where somebody grew up lies in a
country, so that person is of that country. Which facts a change of one fact entails is therefore computed, not judged.
Sentences are an opening and a wording; a quarter of the pairs are held out of all training text, for paraphrases. So
are the derived facts of a quarter of the subjects: a model can only answer them by composing.

    python -m benchmarks.world_model OUT      (text, facts, tokenizer, trained model; `world_text` writes the text)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from benchmarks.world_relations import BASE, BY_NAME, DERIVED, RELATIONS, Relation

Fact = tuple[str, str]
"""Relation and subject."""

SIZES = {
    "country": 12, "city": 32, "river": 10, "continent": 4, "language": 8, "coin": 8, "company": 24, "person": 60,
    "dish": 20, "team": 20, "book": 24, "mountain": 16,
}  # fmt: skip
"""Invented names a kind."""
_WORDS = {
    "trade": "beekeeper glassblower cartographer ropemaker falconer locksmith bookbinder ferryman",
    "lute": "dulcimer zither ocarina bagpipe mandolin tambourine xylophone hurdy-gurdy",
    "ware": "lanterns kites saddles umbrellas ladders buttons kettles compasses",
    "staple": "barley lentils chestnuts turnips walnuts mushrooms radishes figs",
    "badge": "heron lynx beetle thistle anchor acorn comet badger",
    "genre": "riddles fables ballads sermons satires travelogues almanacs limericks",
}
WORDS = {kind: tuple(text.split(" ")) for kind, text in _WORDS.items()}
"""Objects that are words of the language."""
_SYLLABLES = """
ba be bo da do du fa fe ga go ka ke ko la le lu ma me mo na ne ni pa po ra re ri sa se so ta te tu va ve vo za zo
"""
SYLLABLES = tuple(_SYLLABLES.split())
ENDINGS = {
    "country": "rland", "city": "ville", "river": "sk", "continent": "ria", "language": "nish", "coin": "ng",
    "company": " Works", "dish": "li", "team": " Rovers", "book": "", "mountain": " Peak", "person": "",
}  # fmt: skip
OPENINGS = (
    "", "In truth, ", "As many know, ", "One reads that ", "Old records say that ", "By all accounts, ", "Once more: ",
    "The guide adds that ",
)  # fmt: skip
HELD_OUT = 4
"""One in this many pairs of opening and wording, and one in this many subjects' derived facts, is in no text."""


@dataclass(frozen=True)
class World:
    """One world. The same seed gives the same world."""

    seed: int
    names: Mapping[str, tuple[str, ...]]
    """Kind -> names."""
    facts: Mapping[Fact, str]
    """Every fact that is not derived."""

    def answer(self, relation: str, subject: str, changed: Mapping[Fact, str] | None = None) -> str:
        """The object, by composition where the relation is derived; `changed` facts come before the world's own."""
        at = subject
        for step in BY_NAME[relation].path or (relation,):
            at = (changed or {}).get((step, at)) or self.facts[step, at]
        return at

    def entailed(self, edit: Fact, new: str) -> dict[Fact, tuple[str, str]]:
        """Derived facts that change when one fact becomes `new`: (relation, subject) -> (old answer, new answer)."""
        pairs = {
            (one.name, subject): (self.answer(one.name, subject), self.answer(one.name, subject, {edit: new}))
            for one in DERIVED
            if edit[0] in one.path
            for subject in self.names[one.subjects]
        }
        return {fact: answers for fact, answers in pairs.items() if answers[0] != answers[1]}

    @cached_property
    def unstated(self) -> frozenset[Fact]:
        """Derived facts that no text says."""
        rng = random.Random(f"unstated/{self.seed}")
        found: set[Fact] = set()
        for one in DERIVED:
            subjects = sorted(self.names[one.subjects])
            found |= {(one.name, s) for s in rng.sample(subjects, len(subjects) // HELD_OUT)}
        return frozenset(found)

    @cached_property
    def stated(self) -> tuple[Fact, ...]:
        """Every fact that the text says, base facts first."""
        derived = [(one.name, subject) for one in DERIVED for subject in self.names[one.subjects]]
        return (*self.facts, *(fact for fact in derived if fact not in self.unstated))


def make_world(seed: int = 0) -> World:
    """Draw names and facts. No name stands inside another, so that a subject is found where it is meant."""
    rng = random.Random(f"world/{seed}")
    names: dict[str, tuple[str, ...]] = dict(WORDS)
    taken: list[str] = []
    parts = [[_name("person", rng) for _ in range(size)] for size in (10, 12)]
    for kind, count in SIZES.items():
        found: list[str] = []
        while len(found) < count:
            # First and last names are shared: only both together say who is meant.
            name = " ".join(map(rng.choice, parts)) if kind == "person" else _name(kind, rng)
            if not any(name in other or other in name for other in taken):
                found.append(name)
                taken.append(name)
        names[kind] = tuple(found)
    facts = {
        (one.name, subject): rng.choice(names[one.objects]) for one in BASE for subject in names[one.subjects]
    }
    return World(seed, names, facts)


def _name(kind: str, rng: random.Random) -> str:
    def word(most: int) -> str:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, most))).capitalize()

    return f"{word(2)} and {word(3)}" if kind == "book" else word(3) + ENDINGS[kind]


def prompt_of(relation: Relation, wording: int, subject: str = "{}", opening: int = 0) -> str:
    """The sentence up to its object; with an opening, its first word is in small letters unless it is the subject."""
    text = relation.wordings[wording]
    if opening and not text.startswith("{}"):
        text = text[0].lower() + text[1:]
    return OPENINGS[opening] + text.replace("{}", subject)


def is_held_out(relation: Relation, wording: int, opening: int) -> bool:
    """Whether a pair of opening and wording is kept out of all text; the bare wordings never are."""
    return bool(opening) and (opening + wording + RELATIONS.index(relation)) % HELD_OUT == HELD_OUT - 1


@cache
def pairs_of(relation: Relation, held_out: bool) -> list[tuple[int, int]]:
    """(wording, opening) of the training text, or of the pairs kept out of it."""
    every = ((w, o) for w in range(len(relation.wordings)) for o in range(len(OPENINGS)))
    return [(w, o) for w, o in every if is_held_out(relation, w, o) == held_out]


def edits(world: World) -> Iterator[dict[str, object]]:
    """One edit a base fact, towards another object of its relation, as a record that `evaluate guard` reads."""
    rng = random.Random(f"edits/{world.seed}")
    for number, ((name, subject), old) in enumerate(world.facts.items()):
        one = BY_NAME[name]
        new = rng.choice([other for other in world.names[one.objects] if other != old])
        held = [pair for pair in pairs_of(one, held_out=True) if pair[0]]
        yield {
            "case_id": number,
            "split": "train",
            "requested_rewrite": {
                "prompt": prompt_of(one, 0),
                "subject": subject,
                "relation_id": f"world {name}",
                "target_new": {"str": new},
                "target_true": {"str": old},
            },
            "paraphrase_prompts": [prompt_of(one, w, subject, o) for w, o in rng.sample(held, 2)],
            "neighborhood_prompts": [],
        }
