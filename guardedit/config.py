"""Settings: where things lie and how much is measured. Command line > environment > defaults."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Settings of one invocation; passed along, never global."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "smollm2-135m"
    """A known name, a Hugging Face folder or a hub id."""
    home: Path = Path(".guardedit")
    """Versions, plans, ledger and MLflow's database."""
    reports: Path = Path("reports")
    """Where audit reports are written."""
    policy: Path | None = None
    """A policy file, or a level of the model's kit (strict, standard, permissive); None takes the standard one."""
    tracking_uri: str | None = None
    """MLflow; None is a SQLite file under `home`."""
    seed: int = Field(default=0, ge=0)
    device_map: str | None = None
    """How accelerate spreads the model, "auto" for one; None loads it onto the CPU. A place, not a setting of an edit:
    it is in no record."""
    keys: Path | None = None
    """Folder of private keys; None is $GUARDEDIT_KEYS, else the user's settings folder. Never in a home."""
    key: str | None = None
    """Name of the private key to sign with; None is $GUARDEDIT_KEY."""
    thorough: bool = False
    """Monitor on 60k far tokens instead of 8k."""


def cache_folder() -> Path:
    """Converted models and activations that can be computed again: $GUARDEDIT_CACHE, else the user's cache folder."""
    named = os.environ.get("GUARDEDIT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "guardedit"


def keys_folder() -> Path:
    """Private keys: $GUARDEDIT_KEYS, else the user's settings folder; apart from any home, which others may read."""
    named = os.environ.get("GUARDEDIT_KEYS")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "guardedit" / "keys"


def named_key() -> str | None:
    """The private key to sign with where no option names one: $GUARDEDIT_KEY."""
    return os.environ.get("GUARDEDIT_KEY") or None


def key_passphrase() -> str | None:
    """What opens an encrypted private key where nobody is asked: $GUARDEDIT_KEY_PASSPHRASE."""
    return os.environ.get("GUARDEDIT_KEY_PASSPHRASE") or None


def current_user() -> str:
    """The operating system's user: the identity on record until keys are in use."""
    return getpass.getuser()
