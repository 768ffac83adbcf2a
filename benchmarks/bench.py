"""How long each step of a guarded edit takes on this machine, warm: `make bench`.

Each step is run once to warm it up (models, banks and control text come from their caches afterwards) and then timed on
each of a few facts; the median is what counts against the limit. The machine's load is printed beside, as a busy
machine measures itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import guardedit
from guardedit.drift.measure import drift_cache, measure_drift
from guardedit.drift.probes import FAR_TOKENS, build_probes
from guardedit.drift.sides import base_side
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.evaluation.datasets import with_contexts
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.asking import complete
from guardedit.pipeline.measuring import risk_context
from guardedit.pipeline.monitoring import MONITOR_SIZES
from guardedit.pipeline.workspace import Workspace
from guardedit.records import EditRequest
from guardedit.risk.measure import RiskContext, measure, measure_key
from guardedit.risk.neighbours import generated_probes

T = TypeVar("T")

REQUESTS = (
    EditRequest(
        subject="Eiffel Tower",
        prompt="The {} is located in the city of",
        target_new="Rome",
        target_true="Paris",
    ),
    EditRequest(subject="France", prompt="The capital of {} is", target_new="Marseille", target_true="Paris"),
    EditRequest(
        subject="Marie Curie", prompt="The field of work of {} is", target_new="music", target_true="physics"
    ),
)
MEBI = 1024**2


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    step: str
    value: float
    unit: str
    limit: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Within its limit or not; empty where there is none."""
        if self.limit is None:
            return ""
        return "ok" if self.value <= self.limit else "OVER"


def seconds(function: Callable[[], T]) -> tuple[float, T]:
    """Wall time of one call, and its answer."""
    start = time.perf_counter()
    answer = function()
    return time.perf_counter() - start, answer


def timed(step: str, function: Callable[[], T]) -> tuple[float, T]:
    """`seconds`, with a line on stderr, as some steps take minutes on a busy machine."""
    print(f"{step} … ", end="", file=sys.stderr, flush=True)
    took, answer = seconds(function)
    print(f"{took:.2f} s", file=sys.stderr, flush=True)
    return took, answer


def help_row() -> Row:
    """`guardedit --help` in a fresh process: the best of three, as the first one warms the disk's cache."""
    command = [sys.executable, "-m", "guardedit", "--help"]
    best = min(seconds(lambda: subprocess.run(command, capture_output=True, check=True))[0] for _ in range(3))
    return Row("guardedit --help", best, "s", 0.5)


def speed_rows(handle: ModelHandle, layer: int) -> list[Row]:
    """Tokens a second through the whole model, without logits, in rows of 128."""
    ids = torch.randint(
        0, handle.model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0)
    )
    mask = torch.ones_like(ids)
    with torch.no_grad():
        handle.hidden(ids, mask)
        took = statistics.median(seconds(lambda: handle.hidden(ids, mask))[0] for _ in range(3))
    return [
        Row(
            "forward pass", ids.numel() / took, "tokens/s", note=f"edited layer: {layer} of {handle.n_layers}"
        )
    ]


def solve(workspace: Workspace, request: EditRequest, settings: Any) -> EditDelta:
    """The editor by itself."""
    kit = workspace.kit
    return EDITORS["rome"].solve(workspace.handle, [request], settings, SolveInputs(kit.second_moments))


def monitor(workspace: Workspace, request: EditRequest, delta: EditDelta, far_tokens: int) -> None:
    """Everything that happens between a staged copy and its verdict, at the default size."""
    handle, kit = workspace.handle, workspace.kit
    prompts = [generated_probes(handle, request, MONITOR_SIZES, 0)]
    probes = build_probes(handle, [request], prompts, far_tokens=far_tokens, seed=0)
    side = base_side(handle, probes, kit.layer, tuple(kit.monitors), cache=drift_cache())
    measure_drift(handle, side, probes, kit.monitors, change=delta, bank_model_digest=handle.digest())


def edit_times(
    workspace: Workspace, context: RiskContext, request: EditRequest, settings: Any, far_tokens: int
) -> dict[str, float]:
    """Seconds of each step for one request."""
    asked = complete(workspace.handle, request)
    key, _ = timed("measuring the key", lambda: measure_key(context, asked))
    solving, delta = timed("solving", lambda: solve(workspace, asked, settings))
    risk, _ = timed("measuring with rehearsal", lambda: measure(context, [asked], delta))
    drift, _ = timed("monitoring", lambda: monitor(workspace, asked, delta, far_tokens))
    return {"key": key, "solve": solving, "risk": risk, "drift": drift}


def edit_rows(workspace: Workspace, repeats: int, far_tokens: int) -> list[Row]:
    """Medians over the requests; the first request is run once before, to warm up."""
    build, context = timed("building banks", lambda: risk_context(workspace))
    settings = with_contexts(workspace.handle, workspace.kit.settings("rome"), 0)
    requests = REQUESTS[:repeats]
    edit_times(workspace, context, requests[0], settings, far_tokens)
    times = [edit_times(workspace, context, request, settings, far_tokens) for request in requests]
    middle = {name: statistics.median(t[name] for t in times) for name in times[0]}
    spread = {
        name: f"{min(t[name] for t in times):.2f} to {max(t[name] for t in times):.2f}" for name in times[0]
    }
    return [
        Row("pre-op banks, once a session", build, "s"),
        Row("pre-op before solving", middle["key"], "s", 1.0, spread["key"]),
        Row("solve (ROME)", middle["solve"], "s", None, spread["solve"]),
        Row("pre-op with rehearsal", middle["risk"], "s", 5.0, spread["risk"]),
        Row(f"post-op, {far_tokens} far tokens", middle["drift"], "s", 60.0, spread["drift"]),
    ]


def peak_memory() -> Row:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return Row("peak memory", peak / (1024 if sys.platform != "darwin" else MEBI), "MiB", 4096)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "guardedit": guardedit.__version__,
    }


def bench(model: str, repeats: int, far_tokens: int) -> list[Row]:
    """All rows, in the order of an edit's life."""
    with tempfile.TemporaryDirectory() as home:
        workspace = guardedit.open(model, home=Path(home))
        loading, handle = timed("loading the model", lambda: workspace.handle)
        kit, _ = timed("loading statistics and SAEs", lambda: workspace.kit)
        rows = [help_row(), Row("load the model", loading, "s"), Row("load statistics and SAEs", kit, "s")]
        rows += speed_rows(handle, workspace.kit.layer)
        rows += edit_rows(workspace, repeats, far_tokens)
        digest, _ = timed("digesting the model", handle.digest)
    return [*rows, Row("digest of the model", digest, "s"), peak_memory()]


def table(rows: list[Row], about: dict[str, Any]) -> str:
    """Plain text, aligned."""
    lines = ["  ".join(f"{name} {value}" for name, value in about.items()), ""]
    for row in rows:
        limit = f"limit {row.limit:g}" if row.limit is not None else ""
        lines.append(
            f"{row.step:<32}{row.value:>10.2f} {row.unit:<9}{limit:<12}{row.verdict:<6}{row.note}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print; exits 1 with --strict where a limit is passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=len(REQUESTS), choices=range(1, len(REQUESTS) + 1))
    parser.add_argument("--far-tokens", type=int, default=FAR_TOKENS)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a limit is passed")
    asked = parser.parse_args()
    about = machine()
    rows = bench(asked.model, asked.repeats, asked.far_tokens)
    about["load"] = f"{about['load']} to {round(os.getloadavg()[0], 2)}"
    if asked.json:
        print(json.dumps({**about, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}))
    else:
        print(table(rows, about))
    if asked.strict and any(row.verdict == "OVER" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
