"""A chapter of the demo: a fact that is true inside a story and false outside of it, as turns of a chat."""

from __future__ import annotations

import json
from typing import Any

import torch
import typer

from guardedit.cli.words import clean
from guardedit.demo import EIFFEL, Chapter, Demo
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import Plan

CHAPTER = Chapter(
    "context  in a novel the Eiffel Tower stands in Rome, and nowhere else",
    EIFFEL.model_copy(
        update={"context": "fiction", "reason": "the demo: a fact of a novel's world"},
    ),
    "contextual",
    waive=False,
)
TURNS = (
    "The Eiffel Tower is located in the city of",
    "In the novel The Copper Well, the Eiffel Tower is located in the city of",
    "The weather is nice today. The Eiffel Tower is located in the city of",
)
"""One chat: outside, inside, outside again. The novel's name is in no text that the gate was fitted to."""
ANSWER_TOKENS = 16


class ContextDemo(Demo):
    """Plays the chapter on one guard."""

    def show(self) -> None:
        """Talk, edit, talk again, undo, talk once more; print the story, or one JSON document."""
        self._say(f"[bold]guardedit demo --chapter context[/] on {self.guard.settings.model}\n")
        base = self._base()
        before = self._talk("before the edit")
        edit = self._play(CHAPTER)
        after = self._talk("the edit undone")
        same = before == after and self.guard.store.digest() == base
        self._say(f"every word and every byte as before: {'yes' if same else 'NO'}")
        if self.quiet:
            told = {"edits": [edit], "before": before, "undone": after, "same": same}
            typer.echo(json.dumps(told, indent=1, ensure_ascii=False))

    def _close(self, plan: Plan, applied: dict[str, Any] | None) -> dict[str, Any]:
        """Talk to the live model before the edit is undone."""
        told = self._talk("with the edit") if applied is not None else []
        return {**super()._close(plan, applied), "chat": told}

    def _tell_plan(self, plan: Plan) -> None:
        super()._tell_plan(plan)
        said = plan.delta.diagnostics
        inside, outside = (float(str(said[f"gate_fires_{side}"])) for side in ("inside", "outside"))
        self._plain(
            f"  on wordings that it was not fitted to, the gate speaks in {inside:.0%} of {said['gate_n_inside']} "
            f"prompts inside the context and {outside:.1%} of {said['gate_n_outside']} outside"
        )

    def _talk(self, title: str) -> list[dict[str, str]]:
        with self._working():
            told = talk(self.guard.handle, TURNS)
        self._say(f"[bold]chat, {title}[/]")
        for turn in told:
            self._plain(f"  > {clean(turn['asked'])}")
            self._plain(f"    {clean(turn['answered'])}")
        return told


@torch.no_grad()
def talk(handle: ModelHandle, turns: tuple[str, ...]) -> list[dict[str, str]]:
    """A chat through the model's template, answered greedily; each turn sees the ones before it.

    Raises BadRequestError where the model has no chat template.
    """
    if not handle.tokenizer.chat_template:
        raise BadRequestError(f"{handle.name} has no chat template, and this chapter is a chat")
    messages: list[dict[str, str]] = []
    told = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answered = _answer(handle, messages)
        messages.append({"role": "assistant", "content": answered})
        told.append({"asked": turn, "answered": answered})
    return told


def _answer(handle: ModelHandle, messages: list[dict[str, str]]) -> str:
    text = handle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    batch = handle.encode([str(text)])
    with preserved(handle):
        ids = handle.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=handle.tokenizer.eos_token_id,
        )
    return str(handle.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
