"""Writes the text mix that the default model's autoencoders are trained on, as a folder for `guardedit sae train`.

    python benchmarks/sae_texts.py --data ../shared/data --out ~/.cache/guardedit/texts --tokens 2200000

The sources stay outside the repository; each checkpoint's card holds the digest of the rows and the mix by domain.
Never used here: pubmed_abstracts, ewt_web, wikitext2 (they are test text elsewhere). Whole domains kept out of training
and used as test only: openstax_business_computing_study, us_speeches.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 20
SHARES = {
    "wikipedia": 0.30,
    "factbook": 0.05,
    "openstax": 0.22,
    "fiction": 0.10,
    "peps": 0.08,
    "dialogues": 0.05,
    "python": 0.12,
    "facts": 0.08,
}
COUNTRY_PHRASES = {
    "capital_city": "The capital of {} is {}",
    "continent": "{} is a country in {}",
    "currency_name": "The currency of {} is the {}",
}
CHARACTERS_PER_TOKEN = {"python": 3.3, "facts": 3.9, "peps": 4.2}


def records(path: Path) -> list[Any]:
    """All records of a `.jsonl.xz` file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def texts(data: Path, *names: str) -> list[str]:
    """The field "text" of several files under `text/`."""
    return [record["text"] for name in names for record in records(data / "text" / f"{name}.jsonl.xz")]


def python_sources() -> list[str]:
    """Files of the standard library that parse; tests and packaged tools left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "test",
        "tests",
        "site-packages",
        "idlelib",
        "lib2to3",
        "ensurepip",
        "__pycache__",
        "pydoc_data",
    }
    found = []
    for file in sorted(root.rglob("*.py")):
        if skipped & set(file.relative_to(root).parts):
            continue
        source = file.read_text(encoding="utf-8", errors="ignore")
        if 500 < len(source) < 200_000 and _parses(source):
            found.append(source)
    return found


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def dialogues(data: Path, draw: random.Random) -> list[str]:
    """Task dialogues; a third of them in the chat template's markers."""
    found = []
    for text in texts(data, "sgd_dialogues"):
        found.append(_as_chat(text) if draw.random() < 1 / 3 else text)
    return found


def _as_chat(text: str) -> str:
    turns = []
    for line in text.split("\n"):
        speaker, _, said = line.partition(": ")
        role = "user" if speaker == "User" else "assistant"
        turns.append(f"<|im_start|>{role}\n{said}<|im_end|>\n")
    return "".join(turns)


def fact_sentences(data: Path) -> Iterator[str]:
    """Short sentences dense in entities, each with its true object."""
    for record in records(data / "counterfact" / "counterfact_edit_format.jsonl.xz"):
        if record["split"] == "train":
            yield f"{record['prompt']} {record['ground_truth']}"
    for relation in records(data / "relations" / "relations.jsonl.xz"):
        for template in relation["prompt_templates"]:
            for sample in relation["samples"]:
                yield f"{template.replace('{}', sample['subject'])} {sample['object']}"
    yield from _ravel(data)
    yield from _tables(data)


def _ravel(data: Path) -> Iterator[str]:
    with lzma.open(data / "ravel" / "ravel.json.xz", "rt", encoding="utf-8") as file:
        ravel = json.load(file)
    for kind in ("city", "nobel_prize_winner", "occupation", "physical_object"):
        attributes = ravel[f"ravel_{kind}_entity_attributes"]
        parts = ravel[f"ravel_{kind}_entity_to_split"]
        for entity, values in attributes.items():
            if parts.get(entity) == "train":
                yield "; ".join(
                    [f"{entity}: {kind.replace('_', ' ')}"] + [f"{k} {v}" for k, v in values.items() if v]
                )


def _tables(data: Path) -> Iterator[str]:
    for row in records(data / "simple_facts" / "countries.jsonl.xz"):
        for field, phrase in COUNTRY_PHRASES.items():
            if row.get(field):
                yield phrase.format(row["country"], row[field])
    for row in records(data / "simple_facts" / "elements.jsonl.xz"):
        yield f"{row['name']} is a chemical element with the symbol {row['symbol']} and atomic number {row['number']}"
    phrases = {
        "landmark-country": "{} is in the country of {}",
        "person-occupation": "{} works as a {}",
        "park-country": "{} is a park in {}",
        "product-company": "{} is made by {}",
        "person-instrument": "{} plays the {}",
        "person-sport": "{} plays {}",
    }
    for row in records(data / "function_vectors" / "function_vector_pairs.jsonl.xz"):
        if row["task"] in phrases:
            yield phrases[row["task"]].format(row["input"], row["output"])


def facts(data: Path, draw: random.Random) -> list[str]:
    """Fact sentences: half of them one a document, half in paragraphs of six."""
    sentences = sorted(set(fact_sentences(data)))
    draw.shuffle(sentences)
    half = len(sentences) // 2
    paragraphs = [". ".join(sentences[i : i + 6]) + "." for i in range(half, len(sentences), 6)]
    return sentences[:half] + paragraphs


def trimmed(documents: list[str], characters: float, draw: random.Random) -> list[str]:
    """Shuffled documents up to a budget of characters; long ones give a random stretch of at most 12,000."""
    draw.shuffle(documents)
    kept, total = [], 0
    for text in documents:
        start = draw.randrange(max(len(text) - 12_000, 1))
        piece = text[start : start + 12_000]
        kept.append(piece)
        total += len(piece)
        if total >= characters:
            break
    return kept


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_rows(documents: list[str]) -> list[dict[str, str]]:
    """Documents as records with the field "text"."""
    return [{"text": text} for text in documents]


def key_facts(data: Path, n: int = 100) -> list[dict[str, str]]:
    """Prompts and subjects of CounterFact `train` cases, for the share of leakage explained."""
    cases = [
        r for r in records(data / "counterfact" / "counterfact_edit_format.jsonl.xz") if r["split"] == "train"
    ]
    usable = [r for r in cases if r["subject"] in r["prompt"] and not r["prompt"].startswith(r["subject"])]
    chosen = random.Random(SEED).sample(usable, n)
    return [{"prompt": r["prompt"], "subject": r["subject"]} for r in chosen]


def main() -> None:
    """Read the sources, mix and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_200_000)
    options = parser.parse_args()
    draw = random.Random(SEED)
    sources = {
        "wikipedia": texts(options.data, "wikipedia_passages", "wikipedia_articles_100"),
        "factbook": texts(options.data, "factbook_prose"),
        "openstax": texts(
            options.data,
            "openstax_history_society",
            "openstax_life_science",
            "openstax_physical_science_maths",
        ),
        "fiction": texts(options.data, "fiction_standard_ebooks"),
        "peps": texts(options.data, "peps_prose"),
        "dialogues": dialogues(options.data, draw),
        "python": python_sources(),
        "facts": facts(options.data, draw),
    }
    for domain, documents in sources.items():
        budget = SHARES[domain] * options.tokens * CHARACTERS_PER_TOKEN.get(domain, 4.4)
        write(options.out / f"{domain}.jsonl", as_rows(trimmed(documents, budget, draw)))
    for name in ("openstax_business_computing_study", "us_speeches"):
        kept = trimmed(texts(options.data, name), 400_000, draw)
        write(options.out / "held_out" / f"{name}.jsonl", as_rows(kept))
    write(options.out / "keys" / "facts.jsonl", key_facts(options.data))


if __name__ == "__main__":
    main()
