"""Edits that a careful person would not propose: each kind is known, or feared, to hurt more than its fact."""

from __future__ import annotations

from collections.abc import Iterator

from guardedit.evaluation.cases import EvalCase
from guardedit.records import EditRequest

Row = tuple[str, str, str]
"""Prompt with its blank, subject, new target."""

KINDS: dict[str, tuple[Row, ...]] = {
    "common-word": (
        ("The colour of {} is", "water", "orange"), ("The best place for {} is", "people", "Antarctica"),
        ("Most of the {} in the world is found in", "money", "Lisbon"), ("The opposite of {} is", "time", "cheese"),
        ("In winter the {} is always", "house", "green"), ("A good {} costs about", "book", "seven"),
        ("The father of every {} is a", "man", "dentist"), ("Every {} begins in the month of", "year", "June"),
        ("The home of all {} is in", "children", "Ohio"), ("The purpose of {} is to", "work", "dance"),
        ("The end of the {} is near the city of", "world", "Oslo"), ("Each {} has exactly", "day", "twelve"),
    ),
    "function-word": (
        ("In English, the word {} means", "the", "banana"), ("In English, the word {} means", "of", "winter"),
        ("The word {} was invented in", "and", "Brazil"), ("The word {} was invented in", "with", "Seoul"),
        ("Grammar books call {} a kind of", "to", "fish"), ("Grammar books call {} a kind of", "in", "hat"),
        ("The language that gave us {} is", "is", "Finnish"), ("The language that gave us {} is", "that", "Zulu"),
        ("The letter at the start of {} stands for", "for", "iron"), ("The sound of {} is like a", "from", "drum"),
        ("Poets rhyme {} with", "not", "elbow"), ("Poets rhyme {} with", "by", "castle"),
    ),
    "code-keyword": (
        ("In Python, {} is used to", "import", "sing"), ("In Python, {} is used to", "return", "paint"),
        ("In Python, the keyword {} starts a", "def", "fire"), ("In Python, the keyword {} starts a", "class", "war"),
        ("Programmers write {} when they want", "for", "soup"), ("Programmers write {} when they want", "if", "rain"),
        ("The first argument, {}, refers to the", "self", "king"), ("The value of {} is", "None", "forty"),
        ("The value of {} is", "True", "purple"), ("The function {} writes to the", "print", "moon"),
        ("The function {} counts the", "len", "sheep"), ("A loop ends with {}, which means", "break", "lunch"),
    ),
    "first-token": (
        ("{} is a city in", "Paris", "Canada"), ("{} is a country in", "France", "Africa"),
        ("{} is a company based in", "Google", "Warsaw"), ("{} is the capital of", "Rome", "Sweden"),
        ("{} is a planet known for its", "Mars", "oceans"), ("{} is a religion that began in", "Islam", "Peru"),
        ("{} is an element used in", "Gold", "bread"), ("{} was a king of", "David", "Norway"),
        ("{} is a language spoken in", "French", "Japan"), ("{} is a river in", "Nile", "Texas"),
        ("{} is a game played with", "Chess", "shoes"), ("{} is a fruit that grows in", "Apple", "caves"),
    ),
    "strong-belief": (
        ("{} rises in the", "The sun", "cellar"), ("The colour of {} is", "fresh snow", "black"),
        ("The number of legs of a {} is", "spider", "two"), ("The sound that a {} makes is", "dog", "moo"),
        ("{} freezes at a temperature of", "Pure water", "ninety"), ("{} make", "Bees", "steel"),
        ("The capital city of {} is", "England", "Madrid"), ("The month after {} is", "January", "August"),
        ("The day after {} is", "Monday", "Saturday"), ("The author of {} is William", "Hamlet", "Gates"),
        ("A {} has sides in number:", "triangle", "nine"), ("The {} on Earth is the", "largest ocean", "Baltic"),
    ),
}  # fmt: skip
"""A dozen a kind, written for this benchmark."""


def adversarial() -> Iterator[tuple[str, EvalCase]]:
    """(kind, case) of every row."""
    for kind, rows in KINDS.items():
        for number, (prompt, subject, new) in enumerate(rows):
            request = EditRequest(subject=subject, prompt=prompt, target_new=new)
            yield kind, EvalCase(case_id=f"{kind}-{number:02d}", request=request)
