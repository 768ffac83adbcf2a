"""Training of REMEDI's map: the model stays as it is, only the map learns (Hernandez, Li, Andreas 2023).

The map starts as start·(attribute − its mean), which alone makes most facts likelier, and learns the rest on scaled
inputs. It is the one with the lowest held-out loss, copied when it was reached. An interrupted training goes on from
its checkpoint to the same bits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.descent import require_finite
from guardedit.edits.pushed_rows import PushedBatch, make_batches, push_layer
from guardedit.edits.remedi_loss import LossWeights, Terms, batch_terms
from guardedit.edits.remedi_rows import RowSettings, rows_of
from guardedit.edits.remedi_state import Progress, Run, Scaling, best_of, restore_run, save_run
from guardedit.edits.representations import Representations, represent
from guardedit.edits.settings import require_number
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest, digest_of

Told = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""
HELD_OUT_ROWS = 32


@dataclass(frozen=True)
class RemediTraining:
    """How a map is trained; the defaults are those of the shipped one but for `epochs`, of which it had 3."""

    layer: int = 9
    epochs: int = 12
    """At most."""
    patience: int = 2
    """Epochs without a lower held-out loss after which training ends."""
    batch_size: int = 16
    """Rows a step."""
    learning_rate: float = 3e-3
    """AdamW's at the first step; it falls linearly to nothing over all epochs."""
    weight_decay: float = 0.01
    start: float = 1.5
    """What the map begins with, times the attribute's deviation from its mean."""
    held_out: float = 0.1
    """Share of the subjects that training does not see."""
    new_weight: float = 1.0
    old_weight: float = 1.0
    kept_weight: float = 1.0
    """Of the KL a token; see `LossWeights`."""
    prefixes: tuple[str, ...] = ()
    openings: int = 0
    """See `RowSettings`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layer", "patience", "openings", "seed"):
            require_number(self, name, least=0, whole=True)
        for name in ("epochs", "batch_size"):
            require_number(self, name, least=1, whole=True)
        for name in ("learning_rate", "held_out"):
            require_number(self, name, least=0, above=True)
        for name in ("weight_decay", "start", "new_weight", "old_weight", "kept_weight"):
            require_number(self, name, least=0)
        if self.held_out >= 1:
            raise BadRequestError(f"held_out is {self.held_out!r}; it is a share of the subjects, under 1")

    @property
    def hook_name(self) -> str:
        """Where representations are read and directions added."""
        return f"blocks.{self.layer}.hook_resid_post"

    @property
    def weights(self) -> LossWeights:
        """Of the loss."""
        return LossWeights(self.new_weight, self.old_weight, self.kept_weight)

    @property
    def rows(self) -> RowSettings:
        """Of the rows."""
        return RowSettings(self.prefixes, self.openings)


@dataclass(frozen=True)
class Split:
    """Facts to train on and facts to stop by; no subject is in both."""

    train: tuple[EditRequest, ...]
    held_out: tuple[EditRequest, ...]

    @property
    def digest(self) -> str:
        """Of all facts in their order."""
        return digest_of([[r.model_dump(mode="json") for r in part] for part in (self.train, self.held_out)])


@dataclass(frozen=True, eq=False)
class Trained:
    """The best map, and how training went."""

    weight: Float[Tensor, "d_model two_d_model"]
    bias: Float[Tensor, " d_model"]
    losses: tuple[float, ...]
    """Held-out loss before training and after each epoch, in nats."""
    best_epoch: int
    """0 where training never lowered it."""
    finished: bool = True
    """False where it was told to stop early (`until`)."""


def split_facts(requests: Sequence[EditRequest], share: float, seed: int) -> Split:
    """Hold out a share of the subjects, drawn by seed. Raises BadRequestError where either part is empty."""
    subjects = sorted({request.subject.casefold() for request in requests})
    random.Random(f"remedi/{seed}").shuffle(subjects)
    out = set(subjects[: max(1, round(share * len(subjects)))])
    parts = tuple(
        tuple(request for request in requests if (request.subject.casefold() in out) == held)
        for held in (False, True)
    )
    if not all(parts):
        raise BadRequestError(
            f"{len(subjects)} subjects cannot be split for training; give facts about ten subjects or more"
        )
    return Split(*parts)


def train_map(
    handle: ModelHandle,
    facts: Split,
    settings: RemediTraining,
    state: Path | None = None,
    told: Told | None = None,
    *,
    save_every_s: float = 120.0,
    until: int | None = None,
) -> Trained:
    """Train a map; the model is left as it was.

    `state` is a folder for checkpoints; `until` stops, with a checkpoint, after that many steps in all. Raises
    BadRequestError for facts or settings that do not fit the model, SolveError where the loss is no number.
    """
    push_layer(handle, settings.hook_name)
    with preserved(handle):
        trainer = _prepare(handle, facts, settings, told)
        key = digest_of({"model": handle.digest(), "facts": facts.digest, "settings": asdict(settings)})
        restore_run(trainer.run, state, key)
        saver = _Saver(state, key, save_every_s)
        finished = trainer.train(saver, until)
    weight, bias = best_of(trainer.run, trainer.scaling)
    run = trainer.run.progress
    return Trained(weight, bias, run.losses, run.best_epoch, finished)


def _prepare(handle: ModelHandle, facts: Split, settings: RemediTraining, told: Told | None) -> _Trainer:
    """Everything that does not change while the map learns, and an untrained map."""
    sides = []
    for what, requests, size in (
        ("training", facts.train, settings.batch_size),
        ("held-out", facts.held_out, HELD_OUT_ROWS),
    ):
        if told is not None:
            told(f"reading {len(requests)} {what} facts", 0, settings.epochs)
        found = represent(handle, [(r, r.target_new) for r in requests], settings.hook_name)
        rows = rows_of(handle, requests, settings.rows)
        sides.append(_Side(found, make_batches(handle, rows, settings.hook_name, size)))
    scaling = Scaling.of(sides[0].found, settings.start)
    run = Run.start(scaling, settings.learning_rate, settings.weight_decay)
    return _Trainer(handle, settings, sides[0], sides[1], scaling, run, told)


@dataclass(frozen=True, eq=False)
class _Side:
    """Facts with their rows."""

    found: Representations
    batches: tuple[PushedBatch, ...]


@dataclass(eq=False)
class _Saver:
    """Writes checkpoints, not too often."""

    state: Path | None
    key: str
    every_s: float
    last: float = 0.0

    def __call__(self, run: Run, *, now: bool) -> None:
        if self.state is None:
            return
        self.last = self.last or time.monotonic()
        if now or time.monotonic() - self.last > self.every_s:
            save_run(run, self.state, self.key)
            self.last = time.monotonic()


@dataclass(frozen=True, eq=False)
class _Trainer:
    """The loop over epochs and batches."""

    handle: ModelHandle
    settings: RemediTraining
    train_side: _Side
    held_side: _Side
    scaling: Scaling
    run: Run
    told: Told | None

    def train(self, saver: _Saver, until: int | None) -> bool:
        """Train until the epochs or the patience are used up; False where `until` came first."""
        if not self.run.progress.losses:
            self._close_epoch()
        while not self._done():
            order = list(range(len(self.train_side.batches)))
            random.Random(f"{self.settings.seed}/{self.run.progress.epoch}").shuffle(order)
            for number in order[self.run.progress.step :]:
                if until is not None and self._steps() >= until:
                    saver(self.run, now=True)
                    return False
                self._step(self.train_side.batches[number])
                saver(self.run, now=False)
            self.run.progress = replace(self.run.progress, epoch=self.run.progress.epoch + 1, step=0)
            self._close_epoch()
            saver(self.run, now=True)
        return True

    def _done(self) -> bool:
        now = self.run.progress
        return now.epoch >= self.settings.epochs or now.epoch - now.best_epoch >= self.settings.patience > 0

    def _steps(self) -> int:
        now = self.run.progress
        return now.epoch * len(self.train_side.batches) + now.step

    def _step(self, batch: PushedBatch) -> None:
        total = self.settings.epochs * len(self.train_side.batches)
        for group in self.run.adam.param_groups:
            group["lr"] = self.settings.learning_rate * (1 - self._steps() / total)
        self.run.adam.zero_grad()
        with torch.enable_grad():
            loss = self._terms(self.train_side, batch).total(self.settings.weights)
            loss.backward()
        require_finite(float(loss.detach()), f"step {self._steps()}")
        self.run.adam.step()
        self.run.progress = replace(self.run.progress, step=self.run.progress.step + 1)
        self._tell(float(loss.detach()))

    def _terms(self, side: _Side, batch: PushedBatch) -> Terms:
        found = side.found.select(batch.fact_of)
        return batch_terms(self.handle, batch, self.scaling.directions(found, self.run.weight, self.run.bias))

    def _close_epoch(self) -> None:
        """Measure the held-out loss and remember the best map so far, as a copy."""
        with torch.no_grad():
            terms = [self._terms(self.held_side, batch) for batch in self.held_side.batches]
        loss = float(Terms.added(terms).total(self.settings.weights))
        require_finite(loss, f"the end of epoch {self.run.progress.epoch}")
        self.run.close_epoch(loss)

    def _tell(self, loss: float) -> None:
        if self.told is not None:
            now, of = self.run.progress, self.settings.epochs * len(self.train_side.batches)
            held = f"held-out loss {now.losses[-1]:.2f}"
            self.told(f"epoch {now.epoch + 1}: loss {loss:.2f}, {held} nats", self._steps(), of)


__all__ = ["Progress", "RemediTraining", "Split", "Trained", "split_facts", "train_map"]
