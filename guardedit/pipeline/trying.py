"""Talk to a plan before it is applied: the same prompt to the live model and to the model as it would be."""

from __future__ import annotations

import torch

from guardedit.edits.deltas import rehearsed
from guardedit.models.handle import ModelHandle, preserved
from guardedit.pipeline.workspace import Workspace


def before_and_after(workspace: Workspace, plan_id: str, prompt: str, n_tokens: int = 20) -> tuple[str, str]:
    """Greedy continuations of `prompt` without and with the plan's delta, which runs as a hook: nothing is written."""
    plan = workspace.read_plan(plan_id)
    delta = workspace.read_delta(plan)
    handle = workspace.handle
    before = continued(handle, prompt, n_tokens)
    with rehearsed(handle, delta):
        return before, continued(handle, prompt, n_tokens)


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
