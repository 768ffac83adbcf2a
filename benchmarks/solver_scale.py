"""How far the closed form reaches: thousands of keys at the width of a model of seven billion parameters.

    python -m benchmarks.solver_scale one  --keys 10000 --d-in 11008 --d-out 512
    python -m benchmarks.solver_scale flat --d-in 2048 --d-out 512 --batches 1 10 100 1000 4000

`one` solves one batch by EMMET (no ridge) and by MEMIT, from equal keys and values, and prints processor time, peak
memory and how well the constraints are met. `flat` prints the time an edit of the solve, for batches of growing size.
Everything is float64 on the threads that OMP_NUM_THREADS allows.

C has a power-law spectrum, 1/i and not below 1e-4, turned by a few Householder reflections, so that it is no diagonal
matrix and needs no decomposition to be made; what a solve costs does not depend on that. Keys are ordinary text's
keys, C^½ times normal numbers, in groups that share a direction, as subjects of one kind do. d_out may be smaller than
the real model's: the cost of it is the last product alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from guardedit.edits.solvers import Solution, solve_batch

SEED = 0
REFLECTIONS = 4
GROUP = 100
SHARED = 0.5
"""Share of a key's energy that its group has in common."""
RIDGE = 1000.0


@dataclass(eq=False)
class Synthetic:
    """A second moment by its Cholesky factor alone: what the solvers need, at half of the memory."""

    d_in: int
    seed: int = SEED

    @cached_property
    def reflections(self) -> Tensor:
        """Unit vectors (d_in, REFLECTIONS)."""
        found = _normal(self.d_in, REFLECTIONS, self.seed)
        return found / found.norm(dim=0)

    @cached_property
    def spectrum(self) -> Tensor:
        """Eigenvalues, largest first: 1/i, not below 1e-4."""
        return (1 / torch.arange(1, self.d_in + 1, dtype=torch.float64)).clamp(min=1e-4)

    def turn_(self, x: Tensor) -> Tensor:
        """Q x in place, a reflection after another, blocks of columns at a time."""
        for axis in self.reflections.T:
            for block in x.split(1024, dim=1):
                block.sub_(torch.outer(axis, 2 * (axis @ block)))
        return x

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower factor of C = Q diag(spectrum) Qᵀ, which is overwritten."""
        half = self.turn_(torch.diag(self.spectrum.sqrt()))
        matrix = half @ half.T
        del half
        factor: Tensor = torch.linalg.cholesky_ex(matrix)[0]
        return factor

    def keys(self, count: int) -> Tensor:
        """(d_in, count)."""
        own, groups = _normal(self.d_in, count, self.seed + 1), -(-count // GROUP)
        shared = _normal(self.d_in, groups, self.seed + 2)
        own.mul_((1 - SHARED) ** 0.5)
        for group in range(groups):
            own[:, group * GROUP : (group + 1) * GROUP].add_(SHARED**0.5 * shared[:, group : group + 1])
        return self.turn_(own.mul_(self.spectrum.sqrt()[:, None]))

    def whiten(self, x: Tensor) -> Tensor:
        """L⁻¹x."""
        found: Tensor = torch.linalg.solve_triangular(self.cholesky, x, upper=False)
        return found

    def unwhiten(self, y: Tensor) -> Tensor:
        """L⁻ᵀy."""
        found: Tensor = torch.linalg.solve_triangular(self.cholesky.T, y, upper=True)
        return found


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The outcome and its seconds of processor time: of all threads, and whatever else the machine does."""
    started = time.process_time()
    outcome = work()
    return outcome, time.process_time() - started


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def missed(solution: Solution, keys: Tensor, residuals: Tensor) -> float:
    """‖ΔW K − R‖ / ‖R‖, before anything is cast."""
    total = sum(
        float((solution.update.move(some.T).T - wanted).square().sum())
        for some, wanted in zip(keys.split(1024, dim=1), residuals.split(1024, dim=1), strict=True)
    )
    return float(total**0.5 / residuals.norm())


def one(count: int, d_in: int, d_out: int) -> None:
    """One batch by both solvers."""
    metric = Synthetic(d_in)
    say(
        what="start", threads=torch.get_num_threads(), keys=count, d_in=d_in, d_out=d_out, peak_gib=peak_gib()
    )
    _, seconds = timed(lambda: metric.cholesky)
    gc.collect()
    say(what="second moment, made and factored", cpu_seconds=seconds, peak_gib=peak_gib())
    keys, residuals = metric.keys(count), _normal(d_out, count, SEED + 3)
    for editor, ridge in (("emmet", 0.0), ("memit", RIDGE)):
        solution, seconds = timed(lambda ridge=ridge: solve_batch(keys, residuals, metric, ridge))
        say(
            what=editor, ridge=ridge, cpu_seconds=seconds, cpu_seconds_per_edit=seconds / count,
            missed=missed(solution, keys, residuals), delta_norm=float(solution.update.dense().norm()),
            condition=solution.condition, kind=type(solution.update).__name__, peak_gib=peak_gib(),
        )  # fmt: skip
        del solution
        gc.collect()


def flat(batches: list[int], d_in: int, d_out: int) -> None:
    """Seconds of the solve by batch size."""
    metric = Synthetic(d_in)
    _, seconds = timed(lambda: metric.cholesky)
    say(what="second moment, made and factored", cpu_seconds=seconds, d_in=d_in, d_out=d_out)
    for count in batches:
        keys, residuals = metric.keys(count), _normal(d_out, count, SEED + 3)
        ridge = 0.0 if count <= d_in else RIDGE
        runs = [timed(lambda: solve_batch(keys, residuals, metric, ridge))[1] for _ in range(3)]  # noqa: B023
        say(
            batch=count, ridge=ridge, cpu_seconds=min(runs), cpu_milliseconds_per_edit=1e3 * min(runs) / count
        )


def say(**named: Any) -> None:
    """One JSON line."""
    print(json.dumps(named), flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("one", "flat"))
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10, 100, 1000, 4000])
    parser.add_argument("--d-in", type=int, default=11_008)
    parser.add_argument("--d-out", type=int, default=512)
    args = parser.parse_args()
    if args.what == "one":
        one(args.keys, args.d_in, args.d_out)
    else:
        flat(args.batches, args.d_in, args.d_out)


if __name__ == "__main__":
    main()
