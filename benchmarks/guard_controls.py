"""Are the SAE scores those of the SAE? The same scores from decoders that know nothing, for edits tried before.

    python -m benchmarks.guard_controls OUT --facts FILE --to docs/data/guard_controls.parquet

For each stored delta of `evaluate guard`, the scores that need an SAE are measured again with (random) every decoder
row drawn at random, of the trained row's length, and (shuffled) the trained rows with their energies dealt out anew.
Encoder and thresholds stay: they say how often a latent fires. One row an edit; columns are `pred.<score>@<control>`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.reference_bank import read_delta
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.adversarial import adversarial
from guardedit.evaluation.guard.outcome_prompts import Neighbours, named
from guardedit.evaluation.guard.predictors import SAE_SCORES
from guardedit.evaluation.guard.rows import NAMED
from guardedit.evaluation.readers import read_cases
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.asking import complete
from guardedit.pipeline.measuring import risk_context
from guardedit.risk.context import RiskContext
from guardedit.risk.delta_stage import DELTA_SCORES
from guardedit.risk.delta_view import DeltaView
from guardedit.risk.key_stage import KEY_SCORES, key_scores
from guardedit.risk.key_view import views_of
from guardedit.risk.scores import measure_all
from guardedit.saes.checkpoints import Sae

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


CONTROLS = {"random": random_decoder, "shuffled": shuffled_energies}


def rows_of(out: Path, facts: Path, editor: str) -> Iterator[dict[str, Any]]:
    """A row for each edit that was solved."""
    guard = open_guard(home=out / "home-controls")
    case_set = read_cases(facts, "train")
    pool = Neighbours.of(case_set.cases)
    by_id = {case.case_id: case for case in (*case_set.cases, *(case for _, case in adversarial()))}
    whole = risk_context(guard)
    if whole.key_sae is None:
        raise SystemExit("the kit has no SAE on the key space of its layer")
    contexts = {name: replace(whole, key_sae=make(whole.key_sae)) for name, make in CONTROLS.items()}
    for path in sorted(out.glob(f"{editor}-*.jsonl")):
        for line in path.read_text("utf-8").splitlines()[1:]:
            row = json.loads(line)
            delta = out / f"{editor}-deltas" / f"{row['stratum']}-{row['case_id']}.safetensors"
            if row["error"] is None and delta.is_file():
                request = named(complete(guard.handle, by_id[row["case_id"]].request), pool, NAMED, SEED)
                about = {"editor": editor, "stratum": row["stratum"], "case_id": row["case_id"]}
                yield about | _controlled(contexts, request, read_delta(delta, editor))


def _controlled(contexts: dict[str, RiskContext], request: Any, delta: EditDelta) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, context in contexts.items():
        views = views_of(context, [request])
        of_delta = {one: DELTA_SCORES[one] for one in SAE_SCORES if one in DELTA_SCORES}
        of_key = [one for one in SAE_SCORES if one in KEY_SCORES]
        measured = measure_all(of_delta, DeltaView(context, views, delta), SEED)
        scores = (*key_scores(views[0], of_key), *measured)
        found |= {f"pred.{s.name}@{name}": s.value for s in scores}
    return found


def main() -> None:
    """Measure every stored edit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--editor", default="rome")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    pd.DataFrame(rows_of(args.out, args.facts, args.editor)).to_parquet(
        args.to, compression="zstd", index=False
    )


if __name__ == "__main__":
    main()
