"""Does it pay to keep, of a guarded value, the SAE latents that have nothing to do with the relation? (docs/guarded.md)

    python -m benchmarks.latent_trial run   --data ../shared/data --out OUT [--facts 12] [--weight 0 0.25 1 4 ...]
    python -m benchmarks.latent_trial table docs/data/latent_trial.jsonl

The value of a guarded edit is W k + r. The SAE of the MLP's output says which latents W k has; those that bear least
on log P(old) (activation times |decoder direction · gradient|), all but the `RELATED` share that bears most, are to
stay: weight · Σ (w_enc·r)² / Σ (activation)² is added to each fact's loss (pre-activations are linear in r). `reverse`
keeps the latents that bear most in place of them, `random` as many random directions: two controls. Facts: known ones
of CounterFact's `train` split in the order of seed 1, one a subject; everything is rehearsed on stems that no editor
sees. One row a fact and weight, resumable; rows hold figures, no text of the data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.guarded_trial import SCORES, row
from guardedit.edits import contrast, values
from guardedit.edits.keys import Key, keys_of
from guardedit.edits.objective import Fact, make_objective
from guardedit.edits.values import optimise_values
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.readers import choose, read_cases
from guardedit.evaluation.run import select
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import mlp_hook
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest, canonical
from guardedit.saes.checkpoints import Sae

SEED, RELATED = 1, 0.25
KINDS = ("unrelated", "reverse", "random")


@dataclass(frozen=True, eq=False)
class Held:
    """Of each fact of a batch: directions that r shall not have, and what their squares are divided by."""

    rows: list[Tensor]
    sizes: list[float]

    def loss(self, residuals: Tensor) -> Tensor:
        """(facts,)"""
        pairs = zip(self.rows, self.sizes, residuals, strict=True)
        return torch.stack([(rows @ r).square().sum() / size for rows, size, r in pairs])


def held(handle: ModelHandle, sae: Sae, facts: Sequence[Fact], keys: Sequence[Key], kind: str) -> Held:
    """The latents of every fact's own value, sorted by what they say of the old answer."""
    weight = handle.weight(sae_layer(sae)).detach().float()
    old = [
        replace(f, request=f.request.model_copy(update={"target_new": f.request.target_true})) for f in facts
    ]
    residuals = torch.zeros(len(facts), handle.d_model, requires_grad=True)
    with torch.enable_grad():
        make_objective(handle, old, sae_layer(sae)).losses(residuals).nll.sum().backward()
    if residuals.grad is None:
        raise SystemExit("the old answer's likelihood has no gradient")
    rows, sizes = [], []
    for number, key in enumerate(keys):
        acts = sae.encode((weight @ key.k_star.float())[None])[0].float()
        active = acts.nonzero()[:, 0]
        bears = (acts * (sae.W_dec.float() @ residuals.grad[number]).abs())[active]
        order = active[bears.argsort(descending=kind != "reverse")]
        kept = order[int(RELATED * len(order)) :]
        found = sae.W_enc.float()[:, kept].T
        if kind == "random":
            noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(number))
            found = noise / noise.norm(dim=1, keepdim=True) * found.norm(dim=1, keepdim=True)
        rows.append(found)
        sizes.append(float(acts.square().sum()))
    return Held(rows, sizes)


def sae_layer(sae: Sae) -> int:
    """The layer of an SAE's hook."""
    return int(sae.hook_name.split(".")[1])


@contextmanager
def constrained(
    handle: ModelHandle, sae: Sae, keys: dict[EditRequest, Key], weight: float, kind: str
) -> Iterator[None]:
    """Guarded values with the further term, for as long as this lasts."""
    plain_total = contrast._total

    def with_latents(model: ModelHandle, facts: Sequence[Fact], *rest: Any) -> Any:
        own = held(model, sae, facts, [keys[fact.request] for fact in facts], kind)

        def total(asked: Any, kept: Any, residuals: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
            loss, nll = plain_total(asked, kept, residuals, *others)
            return loss + weight * own.loss(residuals), nll

        with patch.object(contrast, "_total", total):
            return contrast.guarded_values(model, facts, *rest)

    with patch.object(values, "guarded_values", with_latents):
        yield


def cases_of(guard: Guard, data: Path, out: Path, count: int) -> list[EvalCase]:
    """Known facts in the seed's order, one a subject."""
    path = out / "cases.jsonl"
    if not path.is_file():
        pool = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz", "train").cases
        first: dict[str, EvalCase] = {}
        for case in choose(pool, SEED):
            first.setdefault(case.request.subject.casefold(), case)
        chosen = select(guard.handle, list(first.values()), limit=count, known_only=True)
        path.write_text("".join(canonical(case).decode() + "\n" for case in chosen.cases))
    return [EvalCase.model_validate_json(line) for line in path.read_text().splitlines()][:count]


def run(guard: Guard, data: Path, out: Path, count: int, wanted: Sequence[tuple[str, float]]) -> None:
    """All weights on the same facts, a batch a weight."""
    settings = guard.kit.settings("guarded")
    sae = guard.kit.saes[mlp_hook(settings.layer)]
    cases = cases_of(guard, data, out, count)
    requests = [case.request for case in cases]
    keys = keys_of(guard.handle, requests, settings.layer, settings.contexts)
    path = out / "rows.jsonl"
    done = {(one["kind"], one["weight"]) for one in rows_of(path)}
    for kind, weight in wanted:
        if (kind, weight) in done:
            continue
        started = time.process_time()
        with constrained(guard.handle, sae, dict(zip(requests, keys, strict=True)), weight, kind):
            found = optimise_values(guard.handle, requests, keys, settings.layer, settings.contexts, settings)
        seconds = (time.process_time() - started) / len(cases)
        rows = [
            {"kind": kind, "weight": weight, "fact": i, "cpu_s": seconds, **row(guard, *one)}
            for i, one in enumerate(zip(cases, keys, found, strict=True))
        ]
        with path.open("a") as lines:
            lines.writelines(json.dumps(one) + "\n" for one in rows)
        print(f"{kind}, weight {weight:g}: {seconds:.1f} CPU s a value", file=sys.stderr, flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What is measured already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(path: Path) -> str:
    """A row a weight: mean and 95 % bootstrap over facts; the paired difference in same-subject KL to weight 0."""
    every = rows_of(path)
    names = ("efficacy", "paraphrase", "neighborhood", *SCORES, "p_new")
    lines = ["| latents kept | weight | n | " + " | ".join(names) + " | subject_kl less that of weight 0 |"]
    lines.append("|" + "---|" * (len(names) + 4))
    base = [one["subject_kl"] for one in every if one["weight"] == 0]
    for kind, weight in dict.fromkeys((one["kind"], one["weight"]) for one in every):
        rows = [one for one in every if (one["kind"], one["weight"]) == (kind, weight)]
        cells = [_cell([one[name] for one in rows], share=not name.endswith("kl")) for name in names]
        paired = [one["subject_kl"] - two for one, two in zip(rows, base, strict=True)]
        lines.append(
            f"| {kind} | {weight:g} | {len(rows)} | {' | '.join(cells)} | {_cell(paired, share=False)} |"
        )
    return "\n".join(lines)


def _cell(given: Sequence[float | None], *, share: bool) -> str:
    found = estimate(given, SEED, share=share)
    return "–" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--facts", type=int, default=12)
    running.add_argument("--weight", type=float, nargs="+", default=[0.0, 1.0, 4.0, 16.0])
    running.add_argument("--kind", choices=KINDS, nargs="+", default=["unrelated"])
    steps.add_parser("table").add_argument("rows", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.rows))
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        wanted = [(kind, weight) for kind in args.kind for weight in args.weight]
        run(open_guard(home=args.out / "home"), args.data, args.out, args.facts, wanted)


if __name__ == "__main__":
    main()
