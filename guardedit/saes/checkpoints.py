"""Autoencoders on disk, in SAELens' format and with a digest of every file; read here without SAELens.

cfg.json                 SAELens' configuration, architecture "jumprelu", with what it was trained on as metadata
sae_weights.safetensors  W_enc, b_enc, W_dec, b_dec, threshold in 16 bit
stats.safetensors        energy and firing_rate (d_sae,) float32
card.json, labels.json   quality card and labels
digests.json             file -> sha256; canonical JSON, so no byte of it can change unseen either
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardedit.errors import IntegrityError, MissingStatisticsError, StatisticsMismatchError
from guardedit.records import canonical, digest_of, digest_of_bytes, parse_record
from guardedit.saes.cards import Labels, QualityCard
from guardedit.saes.files import write_atomically

FILES = ("card.json", "cfg.json", "labels.json", "sae_weights.safetensors", "stats.safetensors")
PARAMETERS = ("W_dec", "W_enc", "b_dec", "b_enc", "threshold")


@dataclass(frozen=True)
class Sae:
    """An autoencoder with one fixed threshold a latent, so that no latent's move switches another off."""

    hook_name: str
    d_in: int
    d_sae: int
    W_enc: Tensor
    """(d_in, d_sae)"""
    b_enc: Tensor
    """(d_sae,)"""
    W_dec: Tensor
    """(d_sae, d_in); rows of norm 1"""
    b_dec: Tensor
    """(d_in,); subtracted from the input, too"""
    threshold: Tensor
    """(d_sae,); >= 0"""
    energy: Tensor
    """(d_sae,) E[a_f^2] over training tokens"""
    firing_rate: Tensor
    """(d_sae,) share of training tokens with a_f > 0"""
    digest: str
    card: QualityCard
    labels: Labels

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (..., d_sae) of x (..., d_in): JumpReLU, a = z where z > threshold else 0."""
        return jump_relu((x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc, self.threshold)

    def decode(self, latent_acts: Tensor) -> Tensor:
        """Reconstruction (..., d_in) of latent activations (..., d_sae)."""
        return latent_acts @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)), (..., d_in)."""
        return self.decode(self.encode(x))


def jump_relu(pre: Tensor, threshold: Tensor) -> Tensor:
    """Pre-activations where they exceed a non-negative threshold, else 0."""
    return torch.where(pre > threshold, pre.relu(), torch.zeros((), dtype=pre.dtype))


def root() -> Path:
    """Folder of the checkpoints: inside an installed wheel, or beside the package in the source tree."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_sae_checkpoints"
    return shipped if shipped.is_dir() else package.parent / "sae_checkpoints"


def save(
    folder: Path,
    weights: dict[str, Tensor],
    stats: dict[str, Tensor],
    card: QualityCard,
    labels: Labels,
    metadata: dict[str, Any],
) -> str:
    """Write a checkpoint; `weights` are stored in 16 bit. The digest manifest comes last: a torn checkpoint is refused.

    Returns the checkpoint's digest.
    """
    from safetensors.torch import save as to_bytes

    halved = {name: weights[name].detach().cpu().to(torch.float16).contiguous() for name in PARAMETERS}
    broken = [name for name, tensor in halved.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise IntegrityError(
            f"{', '.join(broken)} of {card.hook_name} do not fit 16 bit; nothing was written"
        )
    config = {
        "architecture": "jumprelu",
        "d_in": card.d_in,
        "d_sae": card.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": card.hook_name, "model_name": card.model_name, **metadata},
    }
    contents = {
        "card.json": json.dumps(card.model_dump(mode="json"), indent=1, sort_keys=True).encode(),
        "cfg.json": json.dumps(config, indent=1, sort_keys=True).encode(),
        "labels.json": canonical(labels),
        "sae_weights.safetensors": to_bytes(halved),
        "stats.safetensors": to_bytes(
            {name: stats[name].float().cpu().contiguous() for name in ("energy", "firing_rate")}
        ),
    }
    (folder / "digests.json").unlink(missing_ok=True)
    for name, data in contents.items():
        write_atomically(folder / name, data)
    manifest = {name: digest_of_bytes(data) for name, data in contents.items()}
    write_atomically(folder / "digests.json", canonical(manifest))
    return digest_of(manifest)


def load(
    folder: Path,
    *,
    expect_hook: str | None = None,
    expect_d_in: int | None = None,
    expect_upstream: str | None = None,
) -> Sae:
    """Read a checkpoint and check every byte of it.

    Raises MissingStatisticsError where there is none, IntegrityError where a file was changed or is missing,
    StatisticsMismatchError where it belongs to another hook, width or other weights than expected.
    """
    manifest, contents = _verified(folder)
    config = _parse_config(contents["cfg.json"], folder)
    card = parse_record(QualityCard, contents["card.json"], expected=None, what=f"the card of {folder.name}")
    labels = parse_record(Labels, contents["labels.json"], expected=None, what=f"the labels of {folder.name}")
    _expect(folder, config, card, expect_hook, expect_d_in, expect_upstream)
    weights = _tensors(contents["sae_weights.safetensors"], PARAMETERS, folder)
    stats = _tensors(contents["stats.safetensors"], ("energy", "firing_rate"), folder)
    d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
        "energy": (d_sae,),
        "firing_rate": (d_sae,),
    }
    for name, tensor in {**weights, **stats}.items():
        if tuple(tensor.shape) != shapes[name]:
            raise StatisticsMismatchError(
                f"{name} of {folder.name} is {tuple(tensor.shape)}, expected {shapes[name]}"
            )
    if len(labels.latents) != d_sae:
        raise StatisticsMismatchError(f"{folder.name} has {len(labels.latents)} labels for {d_sae} latents")
    hook_name = str(config["metadata"]["hook_name"])
    return Sae(
        hook_name=hook_name,
        d_in=d_in,
        d_sae=d_sae,
        digest=digest_of(manifest),
        card=card,
        labels=labels,
        **weights,
        **stats,
    )


def load_all(model_name: str, folder: Path | None = None) -> dict[str, Sae]:
    """All checkpoints of a model by hook name, sorted; raises MissingStatisticsError where there is none.

    They lie in `<root>/<model_name>/<hook_name>/`; those of a model named by its absolute folder lie in that folder.
    """
    base = (folder or root()) / model_name
    found = sorted(path.parent for path in base.glob("*/digests.json")) if base.is_dir() else []
    if not found:
        raise MissingStatisticsError(
            f"there are no autoencoders for {model_name}; train them with: guardedit sae train --model {model_name}"
        )
    return {path.name: load(path, expect_hook=path.name) for path in found}


def _verified(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """The digest manifest and the bytes of every file, each checked against it."""
    path = folder / "digests.json"
    if not folder.is_dir():
        raise MissingStatisticsError(
            f"there is no autoencoder at {folder.name}; train it with: guardedit sae train"
        )
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"digests.json of {folder.name} cannot be read: {type(error).__name__}"
        ) from error
    if not isinstance(manifest, dict) or sorted(manifest) != sorted(FILES) or canonical(manifest) != data:
        raise IntegrityError(f"digests.json of {folder.name} was changed; get the checkpoint again")
    contents = {}
    for name in FILES:
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise IntegrityError(f"{name} of {folder.name} cannot be read: {error.strerror}") from error
        if digest_of_bytes(contents[name]) != manifest[name]:
            raise IntegrityError(f"{name} of {folder.name} was changed; get the checkpoint again")
    return manifest, contents


def _parse_config(data: bytes, folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(data)
    fixed = {"architecture": "jumprelu", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    for name, value in fixed.items():
        if config.get(name) != value:
            raise StatisticsMismatchError(
                f"{folder.name}: {name} is {config.get(name)!r}, only {value!r} is supported"
            )
    if not isinstance(config.get("metadata", {}).get("hook_name"), str):
        raise StatisticsMismatchError(f"{folder.name}: its metadata names no hook")
    return config


def _expect(
    folder: Path,
    config: dict[str, Any],
    card: QualityCard,
    hook: str | None,
    d_in: int | None,
    upstream: str | None,
) -> None:
    found = (config["metadata"]["hook_name"], config["d_in"], card.upstream_digest)
    for what, value, expected in zip(
        ("hook", "width", "upstream digest"), found, (hook, d_in, upstream), strict=True
    ):
        if expected is not None and value != expected:
            raise StatisticsMismatchError(
                f"the autoencoder {folder.name} has {what} {value}, expected {expected}; train one for these weights"
            )


def _tensors(data: bytes, names: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load as from_bytes

    found = from_bytes(data)
    if sorted(found) != sorted(names):
        raise StatisticsMismatchError(f"{folder.name} has tensors {sorted(found)}, expected {sorted(names)}")
    tensors = {name: tensor.float() for name, tensor in found.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise IntegrityError(f"{name} of {folder.name} is not finite")
    return tensors
