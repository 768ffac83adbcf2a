"""What both sides of the race share: the facts, one line a solved edit, and what the machine did meanwhile."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from guardedit.evaluation.cases import EvalCase

Line = dict[str, Any]
Solved = tuple[dict[str, Tensor], Line]
"""Parameter -> change, and figures of the solve."""


def cases_of(out: Path, name: str) -> list[EvalCase]:
    """The facts that `facts` drew."""
    lines = (out / f"{name}-cases.jsonl").read_text(encoding="utf-8").splitlines()
    return [EvalCase.model_validate_json(line) for line in lines]


@dataclass(frozen=True)
class Rows:
    """The lines of one side's solved edits, with their changes in files beside."""

    out: Path
    name: str

    @property
    def path(self) -> Path:
        """A line an edit."""
        return self.out / f"{self.name}-rows.jsonl"

    def load(self) -> list[Line]:
        """Every line that is there."""
        return (
            [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []
        )

    def solve(self, label: str, ids: Sequence[str], solve: Callable[[], Solved]) -> None:
        """Time one solve and keep what it gives, unless that was done; `solve` returns changes and figures."""
        if any((row["label"], row["cases"]) == (label, [*ids]) for row in self.load()):
            return
        _forget_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        changes, about = solve()
        spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        file = f"{self.name}-{label}-{ids[0]}.safetensors".replace(" ", "_")
        save_file({name: change.contiguous() for name, change in changes.items()}, self.out / file)
        row = {"label": label, "cases": [*ids], **spent, "rss_mib": _peak_mib(), "load": os.getloadavg()[0]}
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({**row, "gflops": matmul_gflops(), "delta": file, **about}) + "\n")
        print(label, ids[0], round(spent["cpu_s"], 1), about, file=sys.stderr, flush=True)


def matmul_gflops(rows: int = 1024, d_in: int = 576, d_out: int = 1536) -> float:
    """Billions of operations a second of one fp32 product of the value loop's sizes, best of five."""
    left, right = torch.ones(rows, d_in), torch.ones(d_in, d_out)
    times = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(4):
            left @ right
        times.append((time.process_time() - started) / 4)
    return 2 * rows * d_in * d_out / min(times) / 1e9


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
