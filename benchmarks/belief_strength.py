"""Does the strength of a belief tell general truths from arbitrary slots? (docs/conflict.md)

    python -m benchmarks.belief_strength run   --data ../shared/data --out docs/data/belief_strength.json
    python -m benchmarks.belief_strength table docs/data/belief_strength.json

Truths are the commonsense relations of the relations data (30 facts each, seed 0). Arbitrary slots are other relations
of the same data, once about subjects that do not exist (named below, with an object drawn from the relation), once as
they are: facts about people, companies and places that a small model rarely knows. Only figures are kept.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.beliefs import held_logprobs

SEED, EACH, DRAWS = 0, 30, 2_000
TRUTHS = (
    "fruit inside color", "fruit outside color", "object superclass", "substance phase of matter",
    "task person type", "task done by tool", "word sentiment", "work location",
)  # fmt: skip
SLOTS = (
    "city in country", "company CEO", "company hq", "food from country", "landmark in country",
    "person lead singer of band", "person father", "person mother", "person native language", "person occupation",
    "person plays instrument", "person university", "star constellation name", "superhero archnemesis",
)  # fmt: skip
INVENTED = (
    "Velmar Ostrick", "Torvina", "Brellan Hask", "Quindle", "Marrowen", "Ysolde Krant", "Pellinor Grath", "Dorvania",
    "Zemblin", "Hathrel",
)  # fmt: skip

Fact = tuple[str, str, EditRequest]
"""Group, relation, request."""


def facts(path: Path, each: int = EACH) -> list[Fact]:
    """The facts of the three groups, `each` a relation at most."""
    rng = random.Random(SEED)
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        relations = [json.loads(line) for line in lines]
    found: list[Fact] = []
    for relation in relations:
        name, prompt, samples = relation["name"], relation["prompt_templates"][0], list(relation["samples"])
        rng.shuffle(samples)
        group = "truth" if name in TRUTHS else "rare" if name in SLOTS else None
        pairs = [(s["subject"], s["object"]) for s in samples[:each]]
        found += [(group, name, _request(prompt, *pair)) for pair in pairs if group]
        if group == "rare":
            made = [(subject, rng.choice(samples)["object"]) for subject in INVENTED]
            found += [("invented", name, _request(prompt, *pair)) for pair in made]
    return found


def _request(prompt: str, subject: str, old: str) -> EditRequest:
    return EditRequest(subject=subject, prompt=prompt, target_new="(another)", target_true=old)


def measured(handle: ModelHandle, chosen: Sequence[Fact]) -> list[dict[str, Any]]:
    """The score, the bare prompt's probability, and whether the subject is written in small letters."""
    rows = []
    for number, (group, relation, request) in enumerate(chosen):
        found = held_logprobs(handle, request, str(request.target_true))
        rows.append({
            "group": group, "relation": relation, "belief": math.fsum(found) / len(found), "prompt": found[0],
            "small letters": float(request.subject.islower()),
        })  # fmt: skip
        if number % 100 == 99:
            print(f"{number + 1} of {len(chosen)} facts", file=sys.stderr, flush=True)
    return rows


def auroc(rows: Sequence[dict[str, Any]], score: str, against: str) -> dict[str, float]:
    """Truths against one group, with a 95 % bootstrap over relations."""
    kept = [row for row in rows if row["group"] in ("truth", against)]
    names = sorted({(row["group"], row["relation"]) for row in kept})
    by = {name: [row for row in kept if (row["group"], row["relation"]) == name] for name in names}
    rng = np.random.default_rng(SEED)

    def area(parts: Sequence[tuple[str, str]]) -> float:
        drawn = [row for part in parts for row in by[part]]
        return float(roc_auc_score([row["group"] == "truth" for row in drawn], [row[score] for row in drawn]))

    draws = [area(_redrawn(names, rng.choice)) for _ in range(DRAWS)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": area(names), "low": float(low), "high": float(high), "n": len(kept)}


def _redrawn(names: Sequence[tuple[str, str]], choice: Callable[..., Any]) -> list[tuple[str, str]]:
    """Relations drawn with replacement, within each group."""
    groups = [
        [name for name in names if name[0] == "truth"],
        [name for name in names if name[0] != "truth"],
    ]
    return [group[i] for group in groups for i in choice(len(group), len(group))]


def run(data: Path, out: Path) -> None:
    """Measure all facts and keep the figures."""
    with tempfile.TemporaryDirectory() as home:
        handle = open_guard(home=Path(home) / "home").handle
        rows = measured(handle, facts(data / "relations" / "relations.jsonl.xz"))
        digest = handle.digest()
    scores, groups = ("belief", "prompt", "small letters"), ("invented", "rare")
    held = {
        group: np.quantile([math.exp(r["belief"]) for r in rows if r["group"] == group], (0.5, 0.9)).tolist()
        for group in ("truth", *groups)
    }
    found = {
        "seed": SEED, "model_digest": digest, "n": {g: sum(r["group"] == g for r in rows) for g in held},
        "median and 90th percentile of the belief": held,
        "auroc": {score: {group: auroc(rows, score, group) for group in groups} for score in scores},
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")


def table(path: Path) -> str:
    """AUROC of each score, truths against each group."""
    found = json.loads(path.read_text())
    lines = ["| score | against invented subjects | against rare facts |", "|---|---|---|"]
    for score, groups in found["auroc"].items():
        cells = [
            f"{g['value']:.3f} ({g['low']:.2f} to {g['high']:.2f}, n = {g['n']})" for g in groups.values()
        ]
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    steps.add_parser("table").add_argument("figures", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.figures))
    else:
        run(args.data, args.out)


if __name__ == "__main__":
    main()
