"""What to train on what, and where its activations lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from guardedit.config import cache_folder
from guardedit.records import digest_of
from guardedit.saes.gather import Store
from guardedit.saes.texts import Rows, Split, find_files, make_rows, read_split
from guardedit.saes.train import TrainSettings

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle


@dataclass(frozen=True)
class TrainPlan:
    """What to train and on what."""

    texts: tuple[Path, ...]
    """Files or folders of text, a file a domain; see `texts`."""
    layer: int
    """The layer that edits write to."""
    hook_names: tuple[str, ...] = ()
    """Empty: key space and MLP output at `layer`, residual stream three layers up and at two thirds of the depth."""
    settings: TrainSettings = field(default_factory=TrainSettings)
    tokens: int = 2_100_000
    """Training tokens to gather."""
    calibrate_tokens: int = 45_000
    test_tokens: int = 60_000
    row_length: int = 256
    held_out_share: float = 0.06
    facts: Path | None = None
    """JSON lines with `prompt` (subject filled in) and `subject`: keys for the share of leakage explained."""
    out: Path | None = None
    """Where `<model>/<hook_name>/` is written; None is the folder that guardedit reads from."""
    cache: Path | None = None
    """Activations and checkpoints of the training; None is a folder in guardedit's cache."""
    frozen_control_samples: int = 150_000
    """Samples that the frozen-decoder control is trained on; 0 leaves it out, and the card says so."""
    loss_rows: int = 21
    """Held-out rows for the loss recovered; 0 leaves it out."""
    label_tokens: int = 30_000
    """Shippable text per domain and half that label examples are looked for in, where there is as much."""

    def hooks(self, n_layers: int) -> tuple[str, ...]:
        """The hooks to train at, lowest first."""
        if self.hook_names:
            return self.hook_names
        above = min(self.layer + 3, n_layers - 1)
        late = max(round(n_layers * 2 / 3), above)
        residuals = dict.fromkeys(f"blocks.{layer}.hook_resid_post" for layer in (above, late))
        return (f"blocks.{self.layer}.mlp.hook_post", f"blocks.{self.layer}.hook_mlp_out", *residuals)


@dataclass(frozen=True)
class Stores:
    """The activations of the three splits."""

    train: Store
    calibrate: Store
    test: Store


def prepare(handle: ModelHandle, plan: TrainPlan) -> Stores:
    """Read and split the texts; the stores' folders are bound to model and rows."""
    files = find_files(plan.texts)
    seed = plan.settings.seed
    base = plan.cache or cache_folder() / "activations"
    model = handle.digest()

    def rows(split: Split) -> Rows:
        return make_rows(handle, read_split(files, split, seed, plan.held_out_share), plan.row_length, seed)

    def store(split: Split, every: Rows, chosen: Rows) -> Store:
        # Named after all rows of the split: taking more of them later extends the store instead of starting anew.
        name = f"{split}-{digest_of([model, every.digest])[7:23]}"
        return Store(base / handle.name.replace("/", "--") / name, chosen)

    train_rows, calibrate_rows, test_rows = rows("train"), rows("calibrate"), rows("test")
    chosen = test_rows.balanced(plan.test_tokens)
    return Stores(
        store("train", train_rows, train_rows.prefix(plan.tokens)),
        store("calibrate", calibrate_rows, calibrate_rows.prefix(plan.calibrate_tokens)),
        store("test", chosen, chosen),
    )
