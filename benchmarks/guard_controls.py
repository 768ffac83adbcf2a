"""Are the SAE scores those of *this* SAE? The same scores, for edits tried before, from decoders that know nothing and
from an SAE trained with another seed.

    python -m benchmarks.solve_again docs/data/guard_rows.parquet --facts FILE --out OUT
    python -m benchmarks.guard_controls score docs/data/guard_rows.parquet --facts FILE --out OUT --second FOLDER
    python -m benchmarks.guard_controls table OUT --to docs/data/guard_controls.parquet

For natural edits whose update is in OUT. `score` measures the scores that need an SAE with (random) every decoder row
drawn at random, of the trained row's length; (shuffled) the trained rows with their energies dealt out anew; (second)
the SAE in FOLDER, of the same hook and sources and another seed. Encoder and thresholds of the first two stay: they say
how often a latent fires. Resumable; columns are `pred.<score>@<control>`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks.solve_again import edits_of, lines_of, measure_solved
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.frames import read_rows
from guardedit.evaluation.guard.predictors import SAE_SCORES
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.guard.strata import Chosen
from guardedit.evaluation.rowfile import RowFile
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.measuring import risk_context
from guardedit.records import EditRequest
from guardedit.risk.context import RiskContext
from guardedit.risk.delta_stage import DELTA_SCORES
from guardedit.risk.delta_view import DeltaView
from guardedit.risk.key_stage import KEY_SCORES, key_scores
from guardedit.risk.key_view import KeyView, views_of
from guardedit.risk.scores import measure_all
from guardedit.saes.checkpoints import Sae, load

SEED = 0


def random_decoder(sae: Sae) -> Sae:
    """Directions drawn at random, as long as the trained ones."""
    noise = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(sae.W_dec.shape, generator=noise)
    return replace(sae, W_dec=drawn / drawn.norm(dim=1, keepdim=True) * sae.W_dec.norm(dim=1, keepdim=True))


def shuffled_energies(sae: Sae) -> Sae:
    """The trained directions, each with another latent's energy."""
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(SEED))
    return replace(sae, energy=sae.energy[order])


def score(bench: Bench, edits: list[Chosen], saes: Mapping[str, Sae], file: RowFile) -> None:
    """A row for every edit that was solved."""
    whole = risk_context(bench.workspace)
    contexts = {name: replace(whole, key_sae=sae) for name, sae in saes.items()}
    measure_solved(bench, edits, file, partial(controlled, contexts))


def controlled(
    contexts: Mapping[str, RiskContext], request: EditRequest, delta: EditDelta
) -> dict[str, float | None]:
    """The SAE scores of one edit in each context; the contexts differ in their SAE alone."""
    found: dict[str, float | None] = {}
    first: KeyView | None = None
    for name, context in contexts.items():
        view = first.at(context) if first else views_of(context, [request])[0]
        if first:
            vars(view)["key"] = first.key  # the layer is the same
        first = first or view
        of_delta = {one: DELTA_SCORES[one] for one in SAE_SCORES if one in DELTA_SCORES}
        measured = measure_all(of_delta, DeltaView(context, (view,), delta), SEED)
        scores = (*key_scores(view, [one for one in SAE_SCORES if one in KEY_SCORES]), *measured)
        found |= {f"pred.{s.name}@{name}": s.value for s in scores}
    return found


def table(out: Path) -> pd.DataFrame:
    """The scored edits."""
    return pd.DataFrame([row for path in sorted(out.glob("*-controls.jsonl")) for row in lines_of(path)])


def run(args: argparse.Namespace) -> None:
    """Score."""
    guard = open_guard(home=args.out / "home-controls")
    edits, pool = edits_of(read_rows(args.source), args.facts, args.editor, natural=True)
    bench = Bench(guard, args.editor, pool, SEED, deltas=args.out / f"{args.editor}-deltas")
    trained = risk_context(guard).key_sae
    if trained is None:
        raise SystemExit("the kit has no SAE on the key space of its layer")
    saes = {"random": random_decoder(trained), "shuffled": shuffled_energies(trained)}
    if args.second:
        saes["second"] = load(args.second, expect_hook=trained.hook_name, expect_d_in=trained.d_in)
    header = {"model": guard.handle.digest(), "seed": SEED, "saes": {n: s.digest for n, s in saes.items()}}
    score(bench, edits, saes, RowFile(args.out / f"{args.editor}-controls.jsonl", header))


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("score", "table"))
    parser.add_argument("source", type=Path, help="the table of edits; of `table`, OUT")
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--editor", default="rome")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--second", type=Path, help="folder of an SAE of the same hook, trained with another seed"
    )
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        table(args.source).to_parquet(args.to, compression="zstd", index=False)
    else:
        run(args)


if __name__ == "__main__":
    main()
