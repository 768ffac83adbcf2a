"""Which layer should ROME write to? A sweep over layers on facts the default model knows.

    python -m benchmarks.layer_sweep --data ../shared/data --layers 3 5 7 9 --facts 40 --out sweep.jsonl

Resumable: a (layer, case) that is in the output file is not computed again. CounterFact `train` split only.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import EditDelta, written
from guardedit.edits.inputs import SolveInputs
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.sources import load
from guardedit.models.statistics import SecondMoment
from guardedit.records import EditRequest

NEIGHBOURS = 5


def train_cases(data: Path) -> list[dict[str, Any]]:
    """CounterFact `train` cases, each with its template and up to five neighbours of the same relation and object."""
    with lzma.open(data / "counterfact/counterfact_edit_format.jsonl.xz", "rt") as lines:
        cases = [case for case in map(json.loads, lines) if case["split"] == "train"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        case["template"] = re.sub(re.escape(case["subject"]), "{}", case["prompt"], count=1)
        groups[case["template"], case["ground_truth"]].append(case)
    for case in cases:
        others = [
            c for c in groups[case["template"], case["ground_truth"]] if c["subject"] != case["subject"]
        ]
        case["neighbours"] = [case["locality_prompt"], *(c["prompt"] for c in others[: NEIGHBOURS - 1])]
    return [case for case in cases if case["template"].count("{}") == 1]


def known(handle: ModelHandle, cases: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """The first `n` cases whose true object is the model's greedy continuation."""
    import torch

    found = []
    for start in range(0, len(cases), 32):
        chunk = cases[start : start + 32]
        batch = handle.encode_pairs([c["prompt"] for c in chunk], [c["ground_truth"] for c in chunk])
        with torch.no_grad():
            hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
        before = torch.zeros_like(batch["target_mask"])
        before[:, :-1] = batch["target_mask"][:, 1:]
        best = handle.logits_at(hidden, before).argmax(-1)
        right = (best == batch["input_ids"][batch["target_mask"]]).split(batch["target_mask"].sum(1).tolist())
        found += [case for case, hit in zip(chunk, right, strict=True) if bool(hit.all())]
        if len(found) >= n:
            break
    return found[:n]


def preference(handle: ModelHandle, prompts: list[str], case: dict[str, Any]) -> list[tuple[float, float]]:
    """Mean token log-probability of (new, true) for each prompt."""
    new = handle.token_logprobs(prompts, [case["target_new"]] * len(prompts))
    true = handle.token_logprobs(prompts, [case["ground_truth"]] * len(prompts))
    return [(float(a.mean()), float(b.mean())) for a, b in zip(new, true, strict=True)]


def measure(handle: ModelHandle, case: dict[str, Any]) -> dict[str, Any]:
    """Efficacy, paraphrase and neighborhood of the model as it is, for one case."""
    prompts = [case["prompt"], case["rephrase_prompt"], *case["neighbours"]]
    scores = preference(handle, prompts, case)
    return {
        "efficacy": scores[0][0] > scores[0][1],
        "paraphrase": scores[1][0] > scores[1][1],
        "neighborhood": [true > new for new, true in scores[2:]],
        "p_new_log": scores[0][0],
        "p_true_log": scores[0][1],
    }


def request_of(case: dict[str, Any]) -> EditRequest:
    """The case as a request."""
    return EditRequest(
        subject=case["subject"],
        prompt=case["template"],
        target_new=case["target_new"],
        target_true=case["ground_truth"],
    )


def edit_row(
    handle: ModelHandle, case: dict[str, Any], moment: SecondMoment, hparams: RomeHparams
) -> dict[str, Any]:
    """Solve, write, measure and restore one edit."""
    started = time.perf_counter()
    delta: EditDelta = solve_rome(
        handle, [request_of(case)], hparams, SolveInputs({moment.hook_name: moment})
    )
    seconds = time.perf_counter() - started
    with written(handle, delta):
        row = measure(handle, case)
    norm = float(delta.changes[0].update.dense().norm())
    ratio = norm / float(handle.weight(hparams.layer).double().norm())
    return {**row, **delta.diagnostics, "seconds": seconds, "delta_norm_ratio": ratio}


def main() -> None:
    """Run the sweep and append one JSON line per layer and case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=Path, required=True, help="folder of <hook name>.safetensors")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--prefixes", type=int, default=5)
    parser.add_argument("--clamp", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tag", default="")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    handle = load()
    cases = train_cases(args.data)
    random.Random(args.seed).shuffle(cases)
    chosen = known(handle, cases, args.facts)
    contexts = sample_contexts(handle, args.prefixes, seed=0)
    done = set()
    if args.out.exists():
        done = {
            (r["tag"], r["layer"], r["case_id"]) for r in map(json.loads, args.out.read_text().splitlines())
        }
    with args.out.open("a") as out:
        for case in chosen:
            base = measure(handle, case)
            for layer in args.layers:
                if (args.tag, layer, case["case_id"]) in done:
                    continue
                moment = SecondMoment.load(args.moments / f"{key_hook(layer)}.safetensors")
                hparams = RomeHparams(
                    layer=layer, contexts=contexts, clamp_norm_factor=args.clamp, learning_rate=args.lr
                )
                row = edit_row(handle, case, moment, hparams)
                line = {"tag": args.tag, "layer": layer, "case_id": case["case_id"], "base": base, **row}
                out.write(json.dumps(line) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
