"""What follows from an edit in the generated world, where every entailed fact is known: docs/second_model.md.

    python -m benchmarks.world_ripple measure OUT --world WORLD --to docs/data/world_ripple.parquet
    python -m benchmarks.world_ripple write docs/data/world_rows.parquet --ripple docs/data/world_ripple.parquet
        --recall WORLD/recall.json --to docs/second_model.md

OUT is a folder of `evaluate guard` whose stored deltas are taken up; WORLD is a folder of `world_model`. Asked are
derived facts that the unedited model answers rightly, and after the edit whether it says the answer that the edit
entails, or still the old one: facts of the edited subject and of others, that the training text says or leaves to be
composed; and the subject's other facts, which the edit leaves alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.guard_evidence import fill
from benchmarks.guard_sections import SECTIONS, shown, table
from benchmarks.guard_together import section_together
from benchmarks.reference_bank import read_delta
from benchmarks.world import Fact, World, make_world, prompt_of
from benchmarks.world_relations import BASE, BY_NAME, RELATIONS
from guardedit.edits.deltas import rehearsed
from guardedit.evaluation.guard.association import figure
from guardedit.evaluation.guard.frames import read_rows
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import load

MOST = 8
"""Questions an edit and group."""
SHOWN = ("counts", "damage", "alone", "sets", "gains", "stopping")
"""Sections of docs/evidence.md that say something of any model; the others are about the default model's kit."""
GROUPS = {
    "target": "the edited fact, its own prompt",
    "paraphrase": "the edited fact, wordings that no text has",
    "own, stated": "entailed about the subject, said by the text",
    "own, unstated": "entailed about the subject, left to be composed",
    "others, stated": "entailed about others, said by the text",
    "others, unstated": "entailed about others, left to be composed",
    "untouched": "the subject's other facts",
}


@dataclass(frozen=True)
class Asked:
    """One question after an edit."""

    group: str
    relation: str
    prompt: str
    old: str
    new: str
    """The old answer where the edit leaves it alone."""


def known_facts(handle: ModelHandle, world: World) -> frozenset[Fact]:
    """Facts, derived ones too, that the unedited model answers rightly in their first wording."""
    facts = [(one.name, subject) for one in RELATIONS for subject in world.names[one.subjects]]
    pairs = [(prompt_of(BY_NAME[name], 0, s), world.answer(name, s)) for name, s in facts]
    found = zip(facts, score_pairs(handle, pairs), strict=True)
    return frozenset(fact for fact, score in found if score.greedy)


def questions(world: World, edit: Fact, new: str, known: frozenset[Fact], seed: int = 0) -> list[Asked]:
    """What one edit is asked: only facts of `known`, at most `MOST` a group, drawn by the seed."""
    name, subject = edit
    entailed = world.entailed(edit, new)
    groups: dict[str, list[Asked]] = {group: [] for group in GROUPS}
    for (relation, who), (old, then) in entailed.items():
        said = "unstated" if (relation, who) in world.unstated else "stated"
        group = f"{'own' if who == subject else 'others'}, {said}"
        if (relation, who) in known:
            prompt = prompt_of(BY_NAME[relation], 0, who)
            groups[group].append(Asked(group, relation, prompt, old, then))
    for one in RELATIONS:
        fact = (one.name, subject)
        if one.subjects == BY_NAME[name].subjects and fact in known and fact != edit and fact not in entailed:
            old = world.answer(*fact)
            groups["untouched"].append(Asked("untouched", one.name, prompt_of(one, 0, subject), old, old))
    rng = random.Random(f"{seed}/{edit}")
    return [one for asked in groups.values() for one in rng.sample(asked, min(MOST, len(asked)))]


def measure(out: Path, folder: Path, editor: str, seed: int) -> Iterator[dict[str, Any]]:
    """A row a question, for every stored edit of the editor."""
    world, handle = make_world(seed), load(str(folder / "model"))
    known = known_facts(handle, world)
    cases = {
        str(case["case_id"]): case
        for case in map(json.loads, (folder / "facts.jsonl").read_text("utf-8").splitlines())
    }
    names = {prompt_of(one, 0): one.name for one in BASE}
    rows = map(json.loads, (out / f"{editor}-known.jsonl").read_text("utf-8").splitlines()[1:])
    for row in (row for row in rows if row["error"] is None):
        edit = (names[row["relation"]], row["subject"])
        asked = [
            Asked("target", edit[0], row["relation"].replace("{}", edit[1]), row["target_true"], row["target_new"]),
            *(
                Asked("paraphrase", edit[0], prompt, row["target_true"], row["target_new"])
                for prompt in cases[row["case_id"]]["paraphrase_prompts"]
            ),
            *questions(world, edit, row["target_new"], known),
        ]  # fmt: skip
        delta = read_delta(out / f"{editor}-deltas" / f"known-{row['case_id']}.safetensors", editor)
        with rehearsed(handle, delta):
            scores = score_pairs(handle, [(one.prompt, said) for one in asked for said in (one.new, one.old)])
        for one, new, old in zip(asked, scores[::2], scores[1::2], strict=True):
            yield {
                "editor": editor, "case_id": row["case_id"], "edited": edit[0], "group": one.group,
                "asked": one.relation, "says_new": new.greedy, "says_old": old.greedy,
            }  # fmt: skip


def section_ripple(rows: pd.DataFrame, seed: int = 0) -> str:
    """Shares by group, their intervals over the edited relations."""

    def share(values: pd.Series[bool], groups: pd.Series[str]) -> str:
        mean = figure(
            lambda a, _: float(a.mean()), *[values.to_numpy(dtype=float)] * 2, groups.to_numpy(), seed
        )
        return shown(mean)

    body = []
    for (editor, group), part in rows.groupby(["editor", "group"], sort=False):
        new = share(part["says_new"], part["edited"]) if group != "untouched" else "–"
        counts = [str(len(part)), str(part["case_id"].nunique())]
        body.append([editor, GROUPS[group], *counts, new, share(part["says_old"], part["edited"])])
    order = list(GROUPS.values())
    body.sort(key=lambda line: (line[0], order.index(line[1])))
    head = (
        "editor",
        "what is asked",
        "questions",
        "edits",
        "says what the edit entails",
        "says the old answer",
    )
    return table(head, body)


def section_recall(found: dict[str, dict[str, float]]) -> str:
    """What the unedited model knows."""
    body = [[kind, f"{one['n']:.0f}", f"{one['known']:.3f}"] for kind, one in found.items()]
    return table(("facts", "n", "whole object decoded greedily"), body)


def write(rows: pd.DataFrame, ripple: pd.DataFrame, recall: dict[str, Any], page: Path) -> None:
    """Put every section between its markers."""
    text = page.read_text("utf-8")
    bodies = {name: SECTIONS[name](rows) for name in SHOWN}
    bodies |= {
        "together": section_together(rows),
        "ripple": section_ripple(ripple),
        "recall": section_recall(recall),
    }
    for name, body in bodies.items():
        text = fill(text, name, body)
    page.write_text(text, "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("measure", "write"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--world", type=Path)
    parser.add_argument("--editor", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ripple", type=Path)
    parser.add_argument("--recall", type=Path)
    args = parser.parse_args(arguments)
    if args.step == "measure":
        rows = [
            row for one in args.editor or ["rome"] for row in measure(args.source, args.world, one, args.seed)
        ]
        pd.DataFrame(rows).to_parquet(args.to, compression="zstd", index=False)
    else:
        recall = json.loads(args.recall.read_text("utf-8"))
        write(read_rows(args.source), pd.read_parquet(args.ripple), recall, args.to)


if __name__ == "__main__":
    main()
