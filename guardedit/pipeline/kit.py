"""A model's kit: layer, settings, statistics, SAEs, policy and reference banks that its edits are made and judged with.

The default model's kit ships in the package. Another model's lies where `guardedit stats collect` and `guardedit sae
train` put it, and says what is missing.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from guardedit.audit.files import write_atomic
from guardedit.config import cache_folder
from guardedit.drift.null import NullBank, load_bank
from guardedit.editors import EDITORS
from guardedit.edits.remedi_map import MAP_FILES, RemediMap, load_map
from guardedit.edits.sealed_pairs import CARD
from guardedit.errors import (
    BadRequestError,
    IntegrityError,
    MissingStatisticsError,
    StatisticsMismatchError,
)
from guardedit.gate.policy import Policy
from guardedit.gate.reference import ReferenceBank
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import HookPoint, key_hook
from guardedit.models.sources import WHEELS
from guardedit.models.statistics import SecondMoment
from guardedit.pipeline.expecting import RISK_MODELS, load_risk_models
from guardedit.pipeline.levels import POLICIES, POLICY, policy_file, policy_of
from guardedit.pipeline.metrics import known_metrics
from guardedit.records import digest_of, digest_of_bytes
from guardedit.risk.calibration import RiskModel
from guardedit.saes.checkpoints import Sae, load_all

KIT_FILE = "kit.json"
PREOP_BANK = "preop_bank.json"
DRIFT_BANK = "drift_bank.json"
MAPS = "remedi"
"""Folder of a folder a map."""


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
    maps: Mapping[str, RemediMap] = field(default_factory=dict)
    """REMEDI's maps, by hook name."""
    risk_models: Mapping[str, RiskModel] = field(default_factory=dict)
    """Editor -> expected damage, fitted on its edits of this model."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """File -> digest, for plans and `verify`."""

    def settings(self, editor: str, overrides: Mapping[str, Any] | None = None) -> Any:
        """The editor's settings; raises BadRequestError for an unknown editor or setting."""
        require_editor(editor)
        kind = EDITORS[editor].hparams
        allowed = {f.name for f in fields(kind)}
        usual = {"layer": self.layer} if "layer" in allowed else {}
        named = {**usual, **self.hparams.get(editor, {}), **(overrides or {})}
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
        """The SAEs that a monitoring reads."""
        return {name: self.saes[name] for name in watched_hooks(self.saes, self.layer, self.drift_bank)}


def require_editor(editor: str) -> None:
    """Raise BadRequestError for an editor that is not there."""
    if editor not in EDITORS:
        raise BadRequestError(f"unknown editor {editor!r}; there are {', '.join(sorted(EDITORS))}")


def full_name(model: str) -> str:
    """A model's name that means the same from every folder: paths are made absolute."""
    return str(Path(model).resolve()) if model not in WHEELS and Path(model).is_dir() else model


def is_shipped(model: str) -> bool:
    """Whether the model's kit lies in the package, where nothing is written."""
    return model in WHEELS and (_shipped(model) / KIT_FILE).is_file()


def _shipped(model: str) -> Path:
    return Path(str(importlib.resources.files("guardedit") / "assets" / model))


def kit_folder(model: str) -> Path:
    """Where a model's kit lies: in the package for known models, else in the cache folder."""
    if is_shipped(model):
        return _shipped(model)
    return cache_folder() / "kits" / full_name(model).strip("/").replace("/", "--")


def load_kit(
    handle: ModelHandle,
    policy: Path | None = None,
    base_manifest: Mapping[str, str] | None = None,
    own_maps: Path | None = None,
) -> Kit:
    """Read and verify the model's kit.

    `base_manifest` is that of the lineage's base, which second moments and SAEs are bound to; without it, the handle's
    own. `own_maps` is a folder of REMEDI maps that come before the kit's. Raises MissingStatisticsError where there is
    no kit yet, IntegrityError where a file was changed, StatisticsMismatchError where it was made for other weights or
    another width, and PolicyError for a policy that cannot be used.
    """
    folder = kit_folder(handle.name)
    if not (folder / KIT_FILE).is_file():
        raise MissingStatisticsError(
            f"{handle.name} has no kit yet: collect second moments with `guardedit stats collect --model {handle.name} "
            "--layer L TEXT...` first"
        )
    plain = read_kit(folder / KIT_FILE)
    digests = _verified(folder, plain["files"])
    moments = [SecondMoment.load(folder / name, handle, base_manifest) for name in plain["second_moments"]]
    saes = _saes(handle, base_manifest)
    bank = load_bank(folder / DRIFT_BANK) if DRIFT_BANK in digests else None
    watched = watched_hooks(saes, plain["layer"], bank)
    kit = Kit(
        folder=folder,
        model=handle.name,
        layer=plain["layer"],
        hparams=plain["hparams"],
        second_moments=_by_hook(moments, plain["layer"]),
        saes=saes,
        policy=policy_of(policy_file(folder, policy, handle.name), known_metrics(watched)),
        preop_bank=ReferenceBank.load(folder / PREOP_BANK) if PREOP_BANK in digests else None,
        drift_bank=bank,
        maps=_maps(handle, folder, digests, base_manifest),
        risk_models=load_risk_models(folder, digests),
    )
    named = {f"sae/{name}": sae.digest for name, sae in kit.saes.items()}
    whole = replace(kit, digests={**digests, **named, "policy": kit.policy.digest})
    return whole if own_maps is None else _with_own_maps(whole, handle, own_maps, base_manifest)


def _by_hook(moments: Iterable[SecondMoment], layer: int) -> dict[str, SecondMoment]:
    found = {moment.hook_name: moment for moment in moments}
    if key_hook(layer) not in found:
        raise MissingStatisticsError(
            f"the kit edits layer {layer} and has no second moment of {key_hook(layer)}; collect it with "
            f"`guardedit stats collect --layer {layer}`"
        )
    return found


def watched_hooks(saes: Iterable[str], layer: int, bank: NullBank | None) -> tuple[str, ...]:
    """Hooks of a monitoring: those that the bank was made with, where there is one and their SAEs are there; else all
    whose input an edit can move, which the key space's is not. Other SAEs serve gates."""
    moved = [name for name in saes if name != key_hook(layer)]
    usual = set(moved) if bank is None else set(bank.hook_names)
    return tuple(name for name in moved if name in usual) if usual <= set(moved) else tuple(moved)


def _maps(
    handle: ModelHandle, folder: Path, files: Iterable[str], base: Mapping[str, str] | None
) -> dict[str, RemediMap]:
    """The kit's REMEDI maps, none where none was trained."""
    folders = sorted({str(Path(name).parent) for name in files if name.startswith(f"{MAPS}/")})
    return _checked_maps(handle, [folder / name for name in folders], base)


def _checked_maps(
    handle: ModelHandle, folders: Iterable[Path], base: Mapping[str, str] | None
) -> dict[str, RemediMap]:
    found = [load_map(folder) for folder in folders]
    for one in found:
        one.check(handle, base)
    return {one.hook_name: one for one in found}


def _with_own_maps(kit: Kit, handle: ModelHandle, folder: Path, base: Mapping[str, str] | None) -> Kit:
    """The kit with a home's own maps before its own; where they are of other layers, plans take the lowest of them."""
    own = _checked_maps(handle, map_folders(folder), base)
    if not own:
        return kit
    usual = kit.hparams.get(MAPS, {})
    layers = sorted(one.layer for one in own.values())
    layer = usual["layer"] if usual.get("layer") in layers else layers[0]
    named = {f"{MAPS}/{name}/own": one.digest for name, one in own.items()}
    return replace(
        kit,
        maps={**kit.maps, **own},
        hparams={**kit.hparams, MAPS: {**usual, "layer": layer}},
        digests={**kit.digests, **named},
    )


def map_folders(folder: Path) -> list[Path]:
    """Folders of the maps in a folder of them; a training that did not end has left none."""
    return sorted(path.parent for path in folder.glob(f"*/{CARD}"))


def _saes(handle: ModelHandle, base: Mapping[str, str] | None) -> dict[str, Sae]:
    """The model's SAEs, none where none were trained: what needs one is then inconclusive, not passed."""
    try:
        found = load_all(handle.name)
    except MissingStatisticsError:
        return {}
    for name, sae in found.items():
        _check_sae(handle, name, sae, base)
    return found


def _check_sae(handle: ModelHandle, name: str, sae: Sae, base: Mapping[str, str] | None) -> None:
    """Raise StatisticsMismatchError unless the SAE was made for this hook's width and these weights."""
    point = HookPoint.parse(name, handle.n_layers)
    width = handle.d_in(point.layer) if name == key_hook(point.layer) else handle.d_model
    if sae.d_in != width:
        raise StatisticsMismatchError(
            f"the SAE at {name} is {sae.d_in} wide, {handle.name} is {width} wide there; train one for this model"
        )
    upstream = handle.hook_digest(name, base)
    if sae.card.upstream_digest != upstream:
        raise StatisticsMismatchError(
            f"the SAE at {name} was trained on weights {sae.card.upstream_digest}, the base of {handle.name} has "
            f"{upstream} upstream of that hook; train one for these weights"
        )


_KIT_KEYS = {"layer": int, "hparams": dict, "second_moments": list, "files": dict, "seal": str}


def read_kit(path: Path) -> dict[str, Any]:
    """The content of a kit.json; raises IntegrityError where it cannot be read or does not hash to its own seal."""
    try:
        plain = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    if not isinstance(plain, dict) or plain.keys() != _KIT_KEYS.keys():
        raise IntegrityError(f"{path} was changed: it does not hold {', '.join(_KIT_KEYS)} and nothing else")
    for key, kind in _KIT_KEYS.items():
        if not isinstance(plain[key], kind):
            raise IntegrityError(
                f"{path} was changed: {key} is {type(plain[key]).__name__}, not {kind.__name__}"
            )
    seal = plain.pop("seal")
    if digest_of(plain) != seal:
        raise IntegrityError(f"{path} was changed: it does not hash to its own seal")
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
    maps = [str(path.relative_to(folder)) for path in (folder / MAPS).glob("*/*") if path.name in MAP_FILES]
    others = [name for name in (PREOP_BANK, DRIFT_BANK, POLICY) if (folder / name).is_file()]
    risks = [str(path.relative_to(folder)) for path in (folder / RISK_MODELS).glob("*.json")]
    levels = [str(path.relative_to(folder)) for path in (folder / POLICIES).glob("*.toml")]
    names = [*moments, *maps, *others, *risks, *levels]
    plain = {
        "layer": layer,
        "hparams": hparams,
        "second_moments": moments,
        "files": {name: digest_of_bytes((folder / name).read_bytes()) for name in sorted(names)},
    }
    sealed = {**plain, "seal": digest_of(plain)}
    text = json.dumps(sealed, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / KIT_FILE, text.encode())
