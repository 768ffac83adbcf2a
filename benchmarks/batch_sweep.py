"""Choose the settings of EMMET, MEMIT and AlphaEdit on batches of facts: values once, then every setting on the same.

    python -m benchmarks.batch_sweep values --data ../shared/data --out OUT
    python -m benchmarks.batch_sweep sweep  --data ../shared/data --out OUT [--moments FOLDER] [--only memit]
    python -m benchmarks.batch_sweep table  OUT/rows.jsonl

Facts: CounterFact `train`, true object known to the model (greedy), drawn by seed 0 as `reference_bank` draws them,
numbers 121 to 170 of its list: neither the bank's hundred nor those that fine-tuning was tuned on. Values are found at
the kit's layer with ROME's settings. Resumable: what lies in OUT is not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reference_bank import cases_of
from guardedit.editors.alphaedit import AlphaEditHparams, alphaedit
from guardedit.editors.emmet import EmmetHparams, emmet
from guardedit.editors.memit import MemitHparams, memit
from guardedit.edits.deltas import EditDelta, written
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import keys_of
from guardedit.edits.spreading import Wanted
from guardedit.edits.values import Value, optimise_values
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.metrics import CaseScores, PromptScore, case_metrics, harmonic_mean
from guardedit.evaluation.scoring import lay_out, score
from guardedit.models.handle import ModelHandle
from guardedit.models.statistics import SecondMoment
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard

FIRST, LAST = 120, 170
CHUNK = 10
"""Facts whose values are found before they are saved."""
SIZES = (10, 50)
"""Facts a batch; smaller batches are taken one after another on the unedited model until all facts were edited."""
METRICS = ("efficacy", "paraphrase", "neighborhood")
KINDS: dict[str, tuple[type, Callable[..., EditDelta]]] = {
    "emmet": (EmmetHparams, emmet),
    "memit": (MemitHparams, memit),
    "alphaedit": (AlphaEditHparams, alphaedit),
}


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    editor: str
    named: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Editor and settings in words."""
        return " ".join([self.editor, *(f"{key}={_short(value)}" for key, value in self.named.items())])


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def settings() -> list[Setting]:
    """The grid; what matters most first."""
    band, ridges = (3, 4, 5), (10.0, 100.0, 1000.0)
    shares = ((0.9, 0.1), (0.8, 0.1), (0.5, 0.1), (0.98, 0.1), (0.9, 1.0), (0.8, 0.01))
    return [
        *(Setting("emmet", {"ridge": ridge}) for ridge in (0.0, 0.1, 1.0)),
        *(Setting("memit", {"layers": band, "ridge": ridge}) for ridge in ridges),
        *(Setting("memit", {"ridge": ridge}) for ridge in ridges),
        *(Setting("alphaedit", {"preserved_energy": energy, "l2": l2}) for energy, l2 in shares),
    ]


# -- values


def solve_values(guard: Guard, cases: list[EvalCase], out: Path) -> None:
    """Optimise and store the value of every fact, with ROME's settings."""
    hparams, layer = guard.kit.settings("rome"), guard.kit.layer
    for start in range(0, len(cases), CHUNK):
        path = out / "values" / f"{start:03d}.safetensors"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        requests = [case.request for case in cases[start : start + CHUNK]]
        keys = keys_of(guard.handle, requests, layer, hparams.contexts)
        found = optimise_values(guard.handle, requests, keys, layer, hparams.contexts, hparams)
        save_file(_packed(found), path)


def _packed(values: tuple[Value, ...]) -> dict[str, Tensor]:
    plain = [[len(v.losses), v.losses[0], v.losses[-1], v.kl_nats, v.p_new, v.clamped] for v in values]
    return {
        "residuals": torch.stack([value.residual for value in values]).contiguous(),
        "plain": torch.tensor(plain, dtype=torch.float64),
    }


def stored_values(out: Path) -> list[Value]:
    """The values in the facts' order; of the losses only number, first and last are kept."""
    found = []
    for path in sorted((out / "values").glob("*.safetensors")):
        tensors = load_file(path)
        for residual, row in zip(tensors["residuals"], tensors["plain"].tolist(), strict=True):
            losses = (*[row[1]] * (int(row[0]) - 1), row[2])
            found.append(Value(residual, losses, row[3], row[4], bool(row[5])))
    return found


def wanted_of(guard: Guard, cases: list[EvalCase], values: list[Value]) -> Wanted:
    """Keys are cheap and taken anew."""
    contexts, layer = guard.kit.settings("rome").contexts, guard.kit.layer
    requests = tuple(case.request for case in cases)
    return Wanted(requests, contexts, layer, keys_of(guard.handle, requests, layer, contexts), tuple(values))


# -- sweep


def sweep(guard: Guard, cases: list[EvalCase], out: Path, only: str | None, moments: Path | None) -> None:
    """Solve, write and measure every batch with every setting; one line of rows.jsonl each."""
    inputs = SolveInputs({**guard.kit.second_moments, **_read_moments(moments)})
    wanted = wanted_of(guard, cases, stored_values(out))
    path = out / "rows.jsonl"
    done = {(row["name"], row["size"]) for row in _rows(path)}
    if ("unedited", 1) not in done:
        _append(path, _row("unedited", 1, _measured(guard.handle, cases), 0.0, []))
    for setting in settings():
        for size in SIZES:
            if (setting.name, size) in done or (only and setting.editor != only):
                continue
            if not set(_band(setting, guard)) <= {int(name.split(".")[1]) for name in inputs.second_moments}:
                continue
            _append(path, _edited(guard, cases, wanted, setting, size, inputs))
            print(setting.name, size, flush=True)


def _band(setting: Setting, guard: Guard) -> tuple[int, ...]:
    return tuple(setting.named.get("layers", (guard.kit.layer,)))


def _edited(
    guard: Guard, cases: list[EvalCase], wanted: Wanted, setting: Setting, size: int, inputs: SolveInputs
) -> dict[str, Any]:
    kind, solve = KINDS[setting.editor]
    hparams = kind(layer=guard.kit.layer, **setting.named)
    found: list[dict[str, float | None]] = []
    deltas: list[EditDelta] = []
    started, measuring = time.perf_counter(), 0.0
    for batch in _batches(len(cases), size):
        some = replace(
            wanted,
            requests=wanted.requests[batch],
            keys=wanted.keys[batch],
            values=wanted.values[batch],
        )
        deltas.append(solve(guard.handle, some, hparams, inputs))
        with written(guard.handle, deltas[-1]):
            before = time.perf_counter()
            found += _measured(guard.handle, cases[batch])
            measuring += time.perf_counter() - before
    seconds = (time.perf_counter() - started - measuring) / len(deltas)
    return _row(setting.name, size, found, seconds, [_about(guard.handle, delta) for delta in deltas])


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _about(handle: ModelHandle, delta: EditDelta) -> dict[str, Any]:
    ratio = max(
        float(change.update.dense().norm() / handle.weight(change.layer).double().norm())
        for change in delta.changes
    )
    told = ("missed_share", "gram_condition", "gram_rank", "free_directions")
    return {"delta_norm_ratio": ratio, **{name: delta.diagnostics.get(name) for name in told}}


def _measured(handle: ModelHandle, cases: list[EvalCase]) -> list[dict[str, float | None]]:
    """Metrics of each case on the model as it is now."""
    prompts = [(case.request.filled, *case.paraphrases, *case.neighborhood) for case in cases]
    pairs = [
        (prompt, target)
        for case, some in zip(cases, prompts, strict=True)
        for prompt in some
        for target in (case.request.target_new, case.target_true)
    ]
    scores = iter(score(handle, lay_out(handle, pairs)))
    found = []
    for case, some in zip(cases, prompts, strict=True):
        both = [PromptScore(new=next(scores), true=next(scores)) for _ in some]
        cut = 1 + len(case.paraphrases)
        split = CaseScores(
            rewrite=tuple(both[:1]), paraphrase=tuple(both[1:cut]), neighborhood=tuple(both[cut:])
        )
        found.append({name: case_metrics(split)[name] for name in (*METRICS, "efficacy_magnitude")})
    return found


def _row(
    name: str, size: int, cases: list[dict[str, float | None]], seconds: float, batches: list[dict[str, Any]]
) -> dict[str, Any]:
    return {"name": name, "size": size, "seconds": seconds, "batches": batches, "cases": cases}


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _read_moments(folder: Path | None) -> dict[str, SecondMoment]:
    """Second moments beside the kit's."""
    found = (
        [SecondMoment.load(path) for path in sorted(folder.glob("*.safetensors"))]
        if folder is not None
        else []
    )
    return {moment.hook_name: moment for moment in found}


# -- table


def table(path: Path) -> str:
    """Mean and 95 % bootstrap interval over facts, seed 0, a line a setting and batch size."""
    head = ("setting", "batch", *METRICS, "harmonic mean", "largest ‖ΔW‖/‖W‖", "missed")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in _rows(path):
        found = [estimate([case[name] for case in row["cases"]], 0) for name in METRICS]
        cells = [f"{one.value:.3f} ({one.low:.2f}–{one.high:.2f})" if one else "–" for one in found]
        mean = harmonic_mean([one.value for one in found if one])
        ratio, missed = (
            max((batch[name] for batch in row["batches"]), default=None)
            for name in ("delta_norm_ratio", "missed_share")
        )
        tail = ["–" if value is None else f"{value:.3f}" for value in (mean, ratio, missed)]
        lines.append("| " + " | ".join([row["name"], str(row["size"]), *cells, *tail]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("values", "sweep"):
        step = steps.add_parser(name)
        step.add_argument("--data", type=Path, required=True)
        step.add_argument("--out", type=Path, required=True)
        step.add_argument("--only", choices=sorted(KINDS))
        step.add_argument("--moments", type=Path, help="second moments beside the kit's")
    steps.add_parser("table").add_argument("rows", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.rows))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    guard = open_guard(home=args.out / "home")
    cases = cases_of(guard, args.data, args.out, LAST)[FIRST:]
    if args.step == "values":
        solve_values(guard, cases, args.out)
    else:
        sweep(guard, cases, args.out, args.only, args.moments)


if __name__ == "__main__":
    main()
