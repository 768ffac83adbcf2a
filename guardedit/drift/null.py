"""What an edit of this model ordinarily does: the bank of accepted real edits that a measurement is ranked in.

Every edit changes something, so "no change" is no useful null (a deterministic model rejects it each time). Real edits
that passed behavioural checks are the yardstick; *sham* edits (towards what the model says anyway) show the numeric
floor; *random* edits of the same norm are reported only: they divide out the very size that harms.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.drift.sides import Progress
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.errors import BadRequestError, IntegrityError, MissingStatisticsError
from guardedit.models.handle import ModelHandle
from guardedit.records import Digest, DriftReport, EditRequest, ProbePrompts, Record, digest_of, parse_record

Kind = Literal["real", "sham", "random"]
RANKED = ("omnibus_near", "omnibus_subject", "omnibus_far", "near_kl", "subject_kl", "far_kl")
"""Statistics that `drift_percentile` is made of."""
SMALLEST_BANK = 20


class BankEntry(Record):
    """One edit of the bank, applied, measured and taken back."""

    name: str
    kind: Kind
    accepted: bool
    """Whether it passed the behavioural checks of whoever built the bank; only accepted real ones are ranked in."""
    statistics: dict[str, float]
    """Score name -> value; what could not be measured is absent."""


class NullBank(Record):
    """Measured edits of one model at one layer, with one set of probes' size."""

    version: int = 1
    model_digest: Digest
    layer: int
    hook_names: tuple[str, ...]
    far_tokens: int
    entries: tuple[BankEntry, ...]
    note: str = ""

    @property
    def digest(self) -> str:
        """Digest of the record."""
        return digest_of(self)

    def values(self, name: str, kind: Kind = "real") -> tuple[float, ...]:
        """One statistic over the bank, in the bank's order; for real edits the accepted ones."""
        chosen = [e for e in self.entries if e.kind == kind and (e.accepted or kind != "real")]
        return tuple(e.statistics[name] for e in chosen if name in e.statistics)

    def percentile(self, name: str, value: float) -> float | None:
        """Share of accepted real edits below `value`, ties counted half, 0 to 100; None with under 20 of them."""
        return rank(self.values(name), value)

    def floor(self, name: str) -> float | None:
        """Largest value over sham edits: below it a value is numeric noise; None without sham edits."""
        return max(self.values(name, "sham"), default=None)

    def overall(self, statistics: Mapping[str, float]) -> float | None:
        """Percentile of an edit's mean rank over RANKED, among the same mean rank of the bank's own edits.

        None where a statistic that the bank has is missing in `statistics`, or the bank is too small. Taking the mean
        first and ranking it again keeps the 5 % at the top 5 %, which the largest of six percentiles would not.
        """
        names = [name for name in RANKED if len(self.values(name)) >= SMALLEST_BANK]
        edits = [e.statistics for e in self.entries if e.kind == "real" and e.accepted]
        complete = [s for s in edits if all(name in s for name in names)]
        if not names or len(complete) < SMALLEST_BANK or any(name not in statistics for name in names):
            return None
        columns = {name: tuple(s[name] for s in complete) for name in names}
        ranks = [float(np.mean([rank(columns[name], s[name]) or 0.0 for name in names])) for s in complete]
        own = float(np.mean([rank(columns[name], statistics[name]) or 0.0 for name in names]))
        return rank(ranks, own)

    def refusal(
        self, model_digest: str, layer: int, hook_names: Sequence[str], far_tokens: int
    ) -> str | None:
        """Why a measurement cannot be ranked in this bank, or None; `model_digest` is the lineage's base."""
        if model_digest != self.model_digest:
            return "the bank was made on another model"
        if layer != self.layer:
            return f"the bank was made at layer {self.layer}, this edit starts at layer {layer}"
        if sorted(hook_names) != sorted(self.hook_names):
            return f"the bank watches {', '.join(self.hook_names)}, this measurement {', '.join(hook_names)}"
        if abs(far_tokens - self.far_tokens) > 0.1 * self.far_tokens:
            return f"the bank was made with {self.far_tokens} far tokens, this measurement has {far_tokens}"
        return None


def rank(values: Sequence[float], value: float) -> float | None:
    """Percentile of `value` among `values`, ties half; None with under 20 values or for a value that is not finite."""
    if len(values) < SMALLEST_BANK or not np.isfinite(value):
        return None
    array = np.asarray(values)
    return float(100 * ((array < value).sum() + 0.5 * (array == value).sum()) / len(array))


def load_bank(path: Path, expected: str | None = None) -> NullBank:
    """Read a bank; raises MissingStatisticsError where there is none, IntegrityError where it cannot be read."""
    if not path.is_file():
        raise MissingStatisticsError(
            f"there is no drift bank {path.name}; build one with benchmarks/reference_bank.py"
        )
    return parse_record(NullBank, path.read_bytes(), expected=expected, what=f"the drift bank {path.name}")


def save_bank(bank: NullBank, path: Path) -> None:
    """Write a bank atomically, one entry a line so that versions can be compared."""
    head = json.dumps(bank.model_dump(mode="json", exclude={"entries"}), sort_keys=True)[:-1]
    lines = ",\n".join(json.dumps(e.model_dump(mode="json"), sort_keys=True) for e in bank.entries)
    _write(path, f'{head}, "entries": [\n{lines}\n]}}\n'.encode())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class BankEdit:
    """One edit to put into a bank; `solve` is called only if the entry is not there yet."""

    name: str
    kind: Kind
    requests: tuple[EditRequest, ...]
    prompts: tuple[ProbePrompts, ...]
    solve: Callable[[], EditDelta]


Measure = Callable[[BankEdit, EditDelta], DriftReport]
Accept = Callable[[DriftReport], bool]


def accept_success(report: DriftReport) -> bool:
    """The edit took: P(new) > P(old) after the prompt. Absolute limits of harm are the policy's business."""
    success = report.score("target_success")
    return success is not None and success.value == 1.0


def build_null_bank(
    handle: ModelHandle,
    edits: Iterable[BankEdit],
    measure: Measure,
    state: Path,
    *,
    layer: int,
    hook_names: Sequence[str],
    far_tokens: int,
    accept: Accept = accept_success,
    note: str = "",
    progress: Progress | None = None,
) -> NullBank:
    """Measure each edit and collect its numbers; `state` (JSON lines) makes it resumable after each edit.

    `measure` applies the delta, measures and takes it back (see `measure.measure_drift`). A state file of another
    model or layer raises IntegrityError instead of being mixed in.
    """
    head = {"model": handle.digest(), "layer": layer, "hooks": list(hook_names), "far_tokens": far_tokens}
    entries = _resume(state, head)
    total = len(edits) if isinstance(edits, Sized) else None
    kept: list[BankEntry] = []
    with state.open("a", encoding="utf-8") as file:
        for edit in edits:
            if edit.name not in entries:
                report = measure(edit, edit.solve())
                entries[edit.name] = entry_of(edit, report, accept)
                file.write(json.dumps(entries[edit.name].model_dump(mode="json")) + "\n")
                file.flush()
                os.fsync(file.fileno())
            kept.append(entries[edit.name])
            if progress is not None:
                progress(f"drift bank, {edit.name}", len(kept) / total if total else 0.0)
    return NullBank(
        model_digest=str(head["model"]), layer=layer, hook_names=tuple(hook_names), far_tokens=far_tokens,
        entries=tuple(kept), note=note,
    )  # fmt: skip


def entry_of(edit: BankEdit, report: DriftReport, accept: Accept = accept_success) -> BankEntry:
    """A report as a line of the bank."""
    statistics = {score.name: score.value for score in report.scores if score.value is not None}
    return BankEntry(name=edit.name, kind=edit.kind, accepted=accept(report), statistics=statistics)


def _resume(state: Path, head: dict[str, object]) -> dict[str, BankEntry]:
    """Entries of an earlier run; a last line that was cut off is dropped, and the file is made whole again."""
    state.parent.mkdir(parents=True, exist_ok=True)
    lines = state.read_text(encoding="utf-8").split("\n") if state.is_file() else []
    whole = lines[:-1]
    if whole and json.loads(whole[0]) != head:
        raise IntegrityError(
            f"{state.name} belongs to another model, layer or probe size; give another state file"
        )
    entries = [BankEntry.model_validate_json(line) for line in whole[1:]]
    text = "\n".join([json.dumps(head), *whole[1:]]) + "\n"
    _write(state, text.encode())
    return {entry.name: entry for entry in entries}


def random_edit(
    delta: EditDelta, key: Float[Tensor, " d_in"], inverse_times_key: Float[Tensor, " d_in"], seed: int
) -> EditDelta:
    """A generic rank-one edit of the same size: random direction out, a corpus token's key in, ‖ΔW‖ as in `delta`.

    ΔW = c·r̂ (C⁻¹k)ᵀ/(kᵀC⁻¹k), r̂ Gaussian on the sphere, c chosen so that the Frobenius norms agree. `inverse_times_key`
    is C⁻¹k of the layer's second moment. Raises BadRequestError unless `delta` changes one rewrite module only.
    """
    if len(delta.changes) != 1 or not delta.touches_only_rewrite_modules:
        raise BadRequestError(
            f"a norm-matched random edit needs one edited layer, this edit has {len(delta.changes)} changes in layers "
            f"{delta.layers}"
        )
    layer = delta.layers[0]
    dense = delta.update(layer).dense()
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(dense.shape[0], 1, generator=generator, dtype=torch.float64)
    right = (inverse_times_key.double() / (key.double() @ inverse_times_key.double()))[None]
    left *= dense.norm() / (left.norm() * right.norm())
    matched = WeightChange(delta.parameters[0], layer, LowRank(left, right))
    return EditDelta((matched,), "random", {"seed": seed}, {"norm_of": delta.editor})
