"""An example policy, and rules to make others of."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardedit.gate.policy import Policy, load_policy

EXAMPLE = Path(__file__).parent / "data" / "policy.toml"
HEAD = 'version = 1\nname = "t"\n'


def _rule(**changes: str) -> str:
    fields = {
        "id": '"a"',
        "metric": '"preop/leakage"',
        "op": '"<="',
        "limit": "1.0",
        "level": '"soft"',
        "sentence": '"It moves by {value}; {op} {limit} is allowed."',
    }
    lines = [f"{key} = {value}" for key, value in (fields | changes).items() if value]
    return "\n[[rule]]\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def example() -> Policy:
    return load_policy(EXAMPLE)
