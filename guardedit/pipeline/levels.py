"""Where the limits come from: a policy file, or one of the levels that the model's kit ships."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from guardedit.editors import EDITORS
from guardedit.errors import PolicyError
from guardedit.gate.rules import Policy, load_policy

POLICY = "policy.toml"
POLICIES = "policies"
"""A kit's folder of the other levels."""
STANDARD = "standard"
LEVELS = ("strict", STANDARD, "permissive")


def policy_file(folder: Path, named: Path | None, model: str) -> Path:
    """The file of a policy that was named: a file's path, a level's name, or nothing, which is the standard level.

    A file comes before a level of the same name. Raises PolicyError for what is neither, and where the kit lacks the
    level.
    """
    if named is not None and named.exists():
        return named
    if named is not None and str(named) not in LEVELS:
        raise PolicyError(
            f"policy {named} cannot be read: No such file; the levels that ship are {', '.join(LEVELS)}"
        )
    level = STANDARD if named is None else str(named)
    path = folder / POLICY if level == STANDARD else folder / POLICIES / f"{level}.toml"
    if path.is_file():
        return path
    if level == STANDARD:
        raise PolicyError(
            f"{model} has no policy yet: write {path} (docs/policy.md says how), or name one with --policy"
        )
    raise PolicyError(f"{model} has no policy {level!r}; name a file, or leave --policy out")


def policy_of(path: Path, known_metrics: Collection[str] | None = None) -> Policy:
    """Read a policy file, metrics and editors compared with those that exist. Raises PolicyError."""
    policy = load_policy(path, known_metrics)
    for rule in policy.rules:
        unknown = sorted(set(rule.editors or ()) - set(EDITORS))
        if unknown:
            raise PolicyError(
                f"policy {path}: rule {rule.id!r} names the unknown editor {unknown[0]!r}; "
                f"there are {', '.join(sorted(EDITORS))}"
            )
    return policy
