"""A model's kit: layer, settings, statistics, SAEs, policy and reference banks that its edits are made and judged with.

The default model's kit ships in the package. Another model's lies where `guardedit stats collect` and `guardedit sae
train` put it, and says what is missing.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from guardedit.config import cache_folder
from guardedit.drift.null import NullBank, load_bank
from guardedit.editors import EDITORS
from guardedit.errors import BadRequestError, IntegrityError, MissingStatisticsError
from guardedit.gate.policy import Policy, load_policy
from guardedit.gate.reference import ReferenceBank
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import SecondMoment
from guardedit.records import digest_of_bytes
from guardedit.saes.checkpoints import Sae, load_all

KIT_FILE = "kit.json"
PREOP_BANK = "preop_bank.json"
DRIFT_BANK = "drift_bank.json"
POLICY = "policy.toml"


@dataclass(frozen=True)
class Kit:
    """Everything that is bound to one model and not to one edit."""

    folder: Path
    model: str
    layer: int
    hparams: Mapping[str, Mapping[str, Any]]
    """Editor -> its settings."""
    second_moments: Mapping[str, SecondMoment]
    saes: Mapping[str, Sae]
    policy: Policy
    preop_bank: ReferenceBank | None = None
    """Scores of real edits, for percentiles."""
    drift_bank: NullBank | None = None
    """What real edits did to this model, for the monitor's ranks."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """File -> digest, for plans and `verify`."""

    def settings(self, editor: str, overrides: Mapping[str, Any] | None = None) -> Any:
        """The editor's settings; raises BadRequestError for an unknown editor or setting."""
        if editor not in EDITORS:
            raise BadRequestError(f"unknown editor {editor!r}; there are {', '.join(sorted(EDITORS))}")
        kind = EDITORS[editor].hparams
        named = {"layer": self.layer, **self.hparams.get(editor, {}), **(overrides or {})}
        allowed = {f.name for f in fields(kind)}
        for name in named:
            if name not in allowed:
                raise BadRequestError(
                    f"{editor} has no setting {name!r}; it has {', '.join(sorted(allowed))}"
                )
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in named.items()})

    @property
    def key_sae(self) -> Sae | None:
        """The SAE on the key space of the edited layer."""
        return self.saes.get(key_hook(self.layer))

    @property
    def monitors(self) -> dict[str, Sae]:
        """The SAEs whose input an edit can move: all but the key space's."""
        return {name: sae for name, sae in self.saes.items() if name != key_hook(self.layer)}


def kit_folder(model: str) -> Path:
    """Where a model's kit lies: in the package for known models, else in the cache folder."""
    shipped = importlib.resources.files("guardedit") / "assets" / model
    if (shipped / KIT_FILE).is_file():
        return Path(str(shipped))
    return cache_folder() / "kits" / model.strip("/").replace("/", "--")


def load_kit(handle: ModelHandle, policy: Path | None = None) -> Kit:
    """Read and verify the model's kit.

    Raises MissingStatisticsError where there is none yet, IntegrityError where a file was changed, and
    StatisticsMismatchError where it was made for other weights.
    """
    folder = kit_folder(handle.name)
    if not (folder / KIT_FILE).is_file():
        raise MissingStatisticsError(
            f"{handle.name} has no kit yet: collect second moments with `guardedit stats collect --model {handle.name} "
            "--layer L TEXT...` first"
        )
    plain = read_kit(folder / KIT_FILE)
    digests = _verified(folder, plain["files"])
    moments = [SecondMoment.load(folder / name, handle) for name in plain["second_moments"]]
    kit = Kit(
        folder=folder,
        model=handle.name,
        layer=plain["layer"],
        hparams=plain["hparams"],
        second_moments={moment.hook_name: moment for moment in moments},
        saes=_saes(handle.name),
        policy=load_policy(policy or folder / POLICY),
        preop_bank=ReferenceBank.load(folder / PREOP_BANK) if PREOP_BANK in digests else None,
        drift_bank=load_bank(folder / DRIFT_BANK) if DRIFT_BANK in digests else None,
    )
    saes = {f"sae/{name}": sae.digest for name, sae in kit.saes.items()}
    return replace(kit, digests={**digests, **saes, "policy": kit.policy.digest})


def _saes(model: str) -> dict[str, Sae]:
    """The model's SAEs, none where none were trained: what needs one is then inconclusive, not passed."""
    try:
        return load_all(model)
    except MissingStatisticsError:
        return {}


def read_kit(path: Path) -> dict[str, Any]:
    """The content of a kit.json; raises IntegrityError where it cannot be read."""
    try:
        plain = json.loads(path.read_bytes())
        if not isinstance(plain, dict) or not {"layer", "hparams", "second_moments", "files"} <= plain.keys():
            raise ValueError("a key is missing")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    return plain


def _verified(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Digests of the kit's files, each compared with the one that kit.json names."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is gone; the kit names it. Install guardedit again")
        found = digest_of_bytes(path.read_bytes())
        if found != expected:
            raise IntegrityError(f"{path} was changed: it hashes to {found}, the kit says {expected}")
    return dict(files)


def write_kit(folder: Path, *, layer: int, hparams: dict[str, dict[str, Any]]) -> None:
    """Write kit.json over the files that lie in `folder`, with their digests."""
    moments = sorted(str(p.relative_to(folder)) for p in (folder / "second_moments").glob("*.safetensors"))
    names = [*moments, *(name for name in (PREOP_BANK, DRIFT_BANK, POLICY) if (folder / name).is_file())]
    plain = {
        "layer": layer,
        "hparams": hparams,
        "second_moments": moments,
        "files": {name: digest_of_bytes((folder / name).read_bytes()) for name in sorted(names)},
    }
    (folder / KIT_FILE).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
