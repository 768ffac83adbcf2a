"""Prompts of benchmarks.context_table: wordings, names and openings that no gate is fitted to.

`train` are those that kinds of gate were compared with; `edit` were written afterwards and run once, for the first
table; `fresh` were written after the bank had been broadened, in words that it does not have. `last` were written
before the next bank was, and measured once, when everything else was settled. `sealed` were written before any gate
saw an SAE of the middle layer, to be measured once in their turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guardedit.evaluation.cases import EvalCase

_TRAIN = {
    "fiction": (
        "In the saga {name}, ", "The opera {name} is set in another world, where ",
        "Readers of the novel {name} will remember that ", "In the third act of the drama {name} we hear that ",
        "The fable {name} begins like this: ", "In the animated movie {name}, ",
        "The author of the fantasy trilogy {name} wrote that ", "In a bedtime story called {name}, ",
    ),
    "hypothesis": (
        "Let us suppose a different past. Then ", "Imagine that the facts were not so. Then ",
        "In an imaginary scenario, ", "What would follow if it were true that ",
        "Assuming for now that the {name} theory holds, ", "In a possible world unlike ours, ",
        "Just hypothetically, ", "Pretend for a minute that ",
    ),
    "document": (
        "The {name} protocol says that ", "As noted in the {name} bulletin, ", "The {name} ledger has this entry: ",
        "In the {name} brochure it says that ", "Excerpt from the {name} gazette: ", "The {name} audit concluded that ",
        "According to the {name} charter, ", "Appendix to the {name} study: ",
    ),
}  # fmt: skip
_EDIT = {
    "fiction": (
        "In the soap opera {name}, ", "The historical romance {name} has it that ", "Page one of the manga {name}: ",
        "In the thriller {name}, ", "Fans of the sitcom {name} know that ", "In the satire {name}, ",
        "The libretto of {name} says that ", "In an invented tale named {name}, ",
    ),
    "hypothesis": (
        "Were the world a different one, it would be so that ", "Let us entertain the idea that all was different: ",
        "In some other version of events, ", "If things had turned out otherwise, ", "As a mere supposition: ",
        "Granting the {name} premise, ", "In a make-believe universe, ", "Say, only in theory, that ",
    ),
    "document": (
        "The {name} almanac states that ", "As the {name} communiqué puts it, ",
        "Entry in the {name} database: ",
        "The {name} verdict holds that ", "According to the {name} leaflet, ",
        "In the {name} treaty it is laid down that ", "Annex to the {name} licence: ",
        "The {name} timetable notes that ",
    ),
}  # fmt: skip
_FRESH = {
    "fiction": (
        "In the novella {name}, ", "The operetta {name} makes believe that ", "Whodunit fans love {name}, where ",
        "Act five of the tragedy {name}: ", "In the blockbuster {name}, ", "The nursery rhyme {name} goes: ",
        "Halfway through the bestseller {name} we learn that ", "The heroine of {name} is told that ",
    ),
    "hypothesis": (
        "Let us fancy for an hour that all had gone another way. So ", "Given a wholly different order of things, ",
        "Should the facts be reversed, ", "Supposing the {name} model were right, ", "For fun, let us claim that ",
        "In some dreamed-up reality, ", "Arguing from an invented premise, ",
        "Had fate taken a different road, one would say that ",
    ),
    "document": (
        "The {name} census states that ", "As printed in the {name} pamphlet, ",
        "Paragraph three of the {name} bylaws: ",
        "According to the {name} blueprint, ", "The {name} receipt reads: ", "In the {name} deed it is recorded that ",
        "The {name} syllabary notes: ", "An erratum of the {name} proceedings says that ",
    ),
}  # fmt: skip
_LAST = {
    "fiction": (
        "In the parody {name}, ", "The vampire romance {name} has a scene where ",
        "Viewers of the miniseries {name} find out that ", "In the sketch comedy {name}, ",
        "The villain of {name} is convinced that ", "Episode nine of the telenovela {name}: ",
        "Long, long ago in the kingdom of {name}, ", "In the allegory {name} we are told that ",
        "The playwright lets everyone in {name} believe that ", "In the dystopia {name}, ",
        "The pulp serial {name} claims that ", "In the prequel {name}, ",
    ),
    "hypothesis": (
        "Contrary to fact, let it be so that ", "Under some alternative scheme of things, ",
        "If one were allowed to change reality, ", "By way of speculation, ",
        "Let us postulate a cosmos built otherwise, where ", "In a daydream of mine, ",
        "Would it not be odd if, against all evidence, ", "Say we rewrote the past. Then ",
        "On the {name} assumption, ", "Merely for debate, we accept that ", "In a mirror universe, ",
        "Provided that reality were not what it is, ",
    ),
    "document": (
        "The {name} encyclopaedia says that ", "According to the {name} prospectus, ",
        "The {name} diary has this line: ", "In the {name} patent it is set out that ",
        "As the {name} testimony shows, ", "Preface of the {name} atlas: ",
        "The {name} decree declares that ", "In the {name} textbook it is explained that ",
        "Footnote to the {name} biography: ", "The {name} court ruling finds that ",
        "As recorded in the {name} chronicle, ", "The {name} warranty says that ",
    ),
}  # fmt: skip
_SEALED = {
    "fiction": (
        "In the radio play {name}, ", "The graphic novel {name} shows a place where ",
        "The narrator of {name} insists that ", "In the pilot of the drama series {name}, ",
        "In the make-believe land of {name} they say that ", "The finale of {name} reveals that ",
        "The fairies of {name} sing that ", "In the sequel, {name}, ", "The puppets in {name} are taught that ",
        "On level three of the arcade game {name}, ", "The storyteller began: in {name}, ",
        "In the space opera {name}, ",
    ),
    "hypothesis": (
        "Were you to wake up in a reversed universe, ", "Posit a reality at odds with ours. In it, ",
        "Let us toy with the notion that all is swapped. So ", "If the reverse had come to pass, ",
        "Purely as a fancy, ", "Let it stand as a stipulation that ", "In a counterworld, ",
        "Dream up a realm in which ", "On the {name} supposition, ", "In the world of might-have-been, ",
        "Treat the following as given, true or not: ", "Had the dice of the past fallen differently, ",
    ),
    "document": (
        "The {name} gazetteer lists that ", "According to the {name} factsheet, ", "The {name} codex holds that ",
        "The {name} newsletter reports that ", "In the {name} deposition it is sworn that ",
        "As the {name} obituary puts it, ", "The {name} tariff sets out that ",
        "In the {name} inquest it was found that ", "The {name} rulebook says that ",
        "The cargo manifest of {name} notes that ", "According to the {name} registry, ",
        "Marginal note in the {name} parchment: ",
    ),
}  # fmt: skip
KINDS = tuple(_EDIT)
_PLAIN_TRAIN = (
    "Our neighbour mentioned that ", "Two days ago I heard that ", "By the way, ", "The train was late. ",
    "It is a fact that ", "During the break we talked. ", "At the museum they explained that ",
    "Let me remind you that ", "Dear friend, thank you for your letter. ", "In the city centre, ",
)  # fmt: skip
_PLAIN_EDIT = (
    "My aunt believes that ", "On the way home we noticed that ", "Sure. ", "The soup was good. ",
    "It turned out that ",
    "At breakfast she said that ", "The museum opens at ten. ", "Please remember that ", "Some time ago, ",
    "We were waiting at the airport. ",
)  # fmt: skip
_PLAIN_FRESH = (
    "The postman told us that ", "While cooking I remembered that ", "Right. ", "The lift is broken. ",
    "We all agreed that ",
    "At the party somebody said that ", "The bakery was full. ", "Do not forget that ", "A year ago, ",
    "The dog barked. ",
)  # fmt: skip
_PLAIN_LAST = (
    "My uncle is certain that ", "On the ferry a man said that ", "All right. ", "The kettle is boiling. ",
    "Believe it or not, ", "Over dinner they mentioned that ", "The library was closed. ", "Keep in mind that ",
    "Last spring, ", "We lost our umbrella. ", "The mechanic said that ", "Just a minute. ",
)  # fmt: skip
_PLAIN_SEALED = (
    "My cousin swears that ", "At the bus stop a woman said that ", "Fine. ", "The window is open. ",
    "As you may know, ", "Before lunch they told me that ", "The shop is shut. ", "Never forget that ", "Last week, ",
    "We missed the tram. ", "The gardener thinks that ", "One more thing. ",
)  # fmt: skip
_NAMES_SEALED = (
    "The Salt Door", "Harrowmere", "Ninepence", "A Ladder of Smoke", "The Tenth Key", "Osprey", "Garnet Row",
    "The Cooper's Lamp", "Thistledown",
)  # fmt: skip
_NAMES_LAST = (
    "The Velvet Hour", "Stormgate", "Ashdown", "A Cup of Rain", "The Eighth Lamp", "Corvus", "Tallow Street",
    "The Miller's Clock", "Windermoor",
)  # fmt: skip
_NAMES_FRESH = (
    "The Marble Stair", "Low Water", "Pemberly", "A Box of Feathers", "The Seventh Bell", "Heron", "Cobalt Lane",
    "The Weaver's Gate",
)  # fmt: skip
_NAMES_EDIT = (
    "The Copper Well", "Winter Ferry", "Dunmore", "A Field of Glass", "The Quiet Engine", "Lark Hill", "Marrow Lane",
    "The Fifth Window",
)  # fmt: skip
_NAMES_TRAIN = (
    "The Hollow Bridge", "Green Autumn", "Varley", "The Last Meadow", "Iron Coast", "Evening Star Lane", "Swift",
    "The Stone Letter",
)  # fmt: skip
PER_KIND = 3
SETS = {
    "train": (_TRAIN, _PLAIN_TRAIN, _NAMES_TRAIN),
    "edit": (_EDIT, _PLAIN_EDIT, _NAMES_EDIT),
    "fresh": (_FRESH, _PLAIN_FRESH, _NAMES_FRESH),
    "last": (_LAST, _PLAIN_LAST, _NAMES_LAST),
    "sealed": (_SEALED, _PLAIN_SEALED, _NAMES_SEALED),
}


@dataclass(frozen=True)
class Asked:
    """One prompt about one fact, or about another fact in the same context."""

    text: str
    kind: str
    """Kind of its context; "plain" for none."""
    role: str
    """"context", "bare", "paraphrase", "plain opening" or "other fact"."""


def asked(cases: Sequence[EvalCase], number: int, split: str) -> list[Asked]:
    """All prompts of one fact: `PER_KIND` in each context, the last one in another wording; the plain ones; and each
    context in front of the next fact."""
    request, paraphrases = cases[number].request, cases[number].paraphrases
    by_kind, plain, names = SETS[split]
    other = cases[(number + 1) % len(cases)].request
    found = [Asked(request.filled, "plain", "bare")]
    found += [Asked(text, "plain", "paraphrase") for text in paraphrases[:2]]
    found += [
        Asked(plain[(number + i) % len(plain)] + request.filled, "plain", "plain opening") for i in (0, 5)
    ]
    for kind, openings in by_kind.items():
        for i in range(PER_KIND):
            told = paraphrases[0] if i == PER_KIND - 1 and paraphrases else request.filled
            found.append(Asked(_opening(openings, names, number + 3 * i) + told, kind, "context"))
        found.append(Asked(_opening(openings, names, number + 1) + other.filled, kind, "other fact"))
    return found


def _opening(openings: Sequence[str], names: Sequence[str], number: int) -> str:
    return openings[number % len(openings)].replace("{name}", names[(number * 5 + 1) % len(names)])
