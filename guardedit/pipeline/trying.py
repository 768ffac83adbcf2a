"""Talk to a plan before it is live: the same prompt to the live model and to the model as it would be."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from guardedit.edits.deltas import rehearsed
from guardedit.errors import StaleError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.workspace import Workspace
from guardedit.records import Plan

STAGED = "the staged copy"
HOOK = "the plan's update as a hook"
HOOK_ELSEWHERE = "the plan's update as a hook, on another model than it was made on"


@dataclass(frozen=True)
class Tried:
    """Two continuations of one prompt."""

    before: str
    after: str
    source: str
    """What the second one comes from."""


def tried(workspace: Workspace, plan_id: str, prompt: str, n_tokens: int = 20) -> Tried:
    """Greedy continuations of `prompt` by the live model and as the plan would have it; nothing is written.

    Of a held edit the staged copy is read back from disk, its digest compared; else the plan's update runs as a hook.
    StaleError for a committed edit, which is live already, LockedError, IntegrityError.
    """
    plan = workspace.read_plan(plan_id)
    state = workspace.state(plan_id)
    if state == "committed":
        raise StaleError(f"edit {plan_id} is live already: there is no before to compare it with")
    if state == "held":
        with editing(workspace):
            return _both(workspace, workspace.staged(plan_id), STAGED, prompt, n_tokens)
    workspace.refresh()
    fresh = not workspace.store.exists or plan.model_digest == workspace.store.digest()
    return _both(workspace, _hooked(workspace, plan), HOOK if fresh else HOOK_ELSEWHERE, prompt, n_tokens)


def before_and_after(workspace: Workspace, plan_id: str, prompt: str, n_tokens: int = 20) -> tuple[str, str]:
    """The two continuations of `tried` alone."""
    found = tried(workspace, plan_id, prompt, n_tokens)
    return found.before, found.after


def _hooked(workspace: Workspace, plan: Plan) -> AbstractContextManager[Any]:
    return rehearsed(workspace.handle, workspace.read_delta(plan))


def _both(
    workspace: Workspace, after: AbstractContextManager[Any], source: str, prompt: str, n_tokens: int
) -> Tried:
    before = continued(workspace.handle, prompt, n_tokens)
    with after:
        return Tried(before, continued(workspace.handle, prompt, n_tokens), source)


@torch.no_grad()
def continued(handle: ModelHandle, prompt: str, n_tokens: int) -> str:
    """The model's greedy continuation, as text."""
    batch = handle.encode([prompt])
    with preserved(handle):
        ids = handle.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=handle.tokenizer.eos_token_id,
        )
    return str(handle.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
