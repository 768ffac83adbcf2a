"""A committed edit as MLflow's registry hands it out: its delta, on the one base that it was solved for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from guardedit.edits.deltas import decode, written
from guardedit.errors import IntegrityError, NotFoundError, StaleError
from guardedit.models.sources import load
from guardedit.pipeline.kit import full_name
from guardedit.pipeline.trying import continued
from guardedit.records import Plan, parse_record


class Served:
    """A base with one delta in force for as long as this object lives."""

    def __init__(self, plan_file: Path, delta_file: Path, base: str | None) -> None:
        """`base`: folder or known name of the model that the edit was solved on; None takes the plan's name.

        StaleError for any other model, IntegrityError where delta or result are not those on record.
        """
        plan = parse_record(Plan, _bytes(plan_file), expected=None, what=plan_file.name)
        delta = decode(_bytes(delta_file), plan.delta)
        handle = load(full_name(base or plan.model_name))
        digest = handle.digest()
        if digest != plan.model_digest:
            raise StaleError(
                f"this version edits model {plan.model_digest}, {handle.name} is {digest}; name the right base with "
                'model_config={"base": FOLDER} (`guardedit export` writes one)'
            )
        self._stack = ExitStack()
        self._handle = self._stack.enter_context(written(handle, delta))
        found = handle.manifest()
        for change in plan.delta.changes:
            if change.acts is None and found[change.parameter] != change.digest_after:
                raise IntegrityError(
                    f"{change.parameter} is {found[change.parameter]}, not {change.digest_after}"
                )

    def answer(self, prompt: str, tokens: int = 20) -> str:
        """The edited model's greedy continuation."""
        return continued(self._handle, prompt, tokens)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
