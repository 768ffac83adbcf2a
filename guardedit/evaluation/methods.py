"""What an evaluated method gives: an edit that is in force for a while, and that may put prompts differently.

A weight editor's `EditDelta` is one as it is. Anything else brings a context manager: inside it the model is edited,
and what it yields rewrites each prompt. `Session` holds edits one on top of the other and takes all of them back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol

from torch import Tensor, nn

from guardedit.edits.deltas import EditDelta, post_images, restore, saved
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, is_activation

Ask = Callable[[str], str]
"""A prompt as it is put while an edit is in force."""
IN_CONTEXT = "in-context"
"""The baseline that edits nothing and states the facts before every prompt."""


class Edit(Protocol):
    """An edit that is more, or less, than a change of weights."""

    @property
    def diagnostics(self) -> Mapping[str, float | int | str | bool | None]:
        """How solving went, for the record."""
        ...

    def in_force(self, handle: ModelHandle) -> AbstractContextManager[Ask]:
        """The model is edited inside, and as it was afterwards, also after an exception; yields how prompts are put."""
        ...


Solve = Callable[[ModelHandle, tuple[EditRequest, ...]], EditDelta | Edit]
"""A method with its settings, second moments and seed bound: solves, writes nothing."""


def statement(requests: Sequence[EditRequest]) -> str:
    """The new facts as sentences."""
    return " ".join(f"{request.filled} {request.target_new.strip()}." for request in requests)


@dataclass(frozen=True)
class InContext:
    """The facts stated before every prompt; no weight is touched."""

    requests: tuple[EditRequest, ...]
    diagnostics: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)

    @contextmanager
    def in_force(self, handle: ModelHandle) -> Iterator[Ask]:
        """States the facts."""
        yield lambda prompt: f"{statement(self.requests)} {prompt}"


def state_in_context(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> InContext:
    """`Solve` of the in-context baseline."""
    return InContext(requests)


class Session:
    """A model under edits, each on top of those before; on leaving, also by an exception, the old bytes are back."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self._saved: dict[str, Tensor] = {}
        self._asks: list[Ask] = []
        self._stack = ExitStack()
        self.reference_head: nn.Module = handle.model.get_submodule(handle.architecture.unembedding)
        """The unedited model's unembedding: its own module, or a copy once an edit may touch it."""

    def __enter__(self) -> Session:
        self._stack.callback(lambda: restore(self.handle, self._saved))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, edit: EditDelta | Edit) -> None:
        """Put one more edit in force. Raises SolveError, before anything is written, if it is not finite."""
        if not isinstance(edit, EditDelta):
            self._keep_head()
            self._asks.append(self._stack.enter_context(edit.in_force(self.handle)))
            return
        images = post_images(self.handle, edit)
        weights = [name for name in images if not is_activation(name)]
        if self._head_parameters() & {id(self.handle.model.get_parameter(name)) for name in weights}:
            self._keep_head()
        # Only the first edit of a tensor finds the bytes that are to be put back.
        self._saved |= saved(self.handle, images.keys() - self._saved.keys())
        restore(self.handle, images)

    def _head_parameters(self) -> set[int]:
        return {id(parameter) for parameter in self.reference_head.parameters()}

    def _keep_head(self) -> None:
        """Copy the unembedding while it is still the unedited model's: predictions before an edit follow from it."""
        live = self.handle.model.get_submodule(self.handle.architecture.unembedding)
        if self.reference_head is live:
            self.reference_head = copy.deepcopy(live)

    @property
    def before(self) -> Mapping[str, Tensor]:
        """The unedited bytes of every parameter that an edit in force has touched."""
        return dict(self._saved)

    @property
    def rewrites_prompts(self) -> bool:
        """Whether a prompt is put differently under the edits."""
        return bool(self._asks)

    def ask(self, prompt: str) -> str:
        """The prompt as it is put under all edits, the first one's words in front."""
        return reduce(lambda text, ask: ask(text), reversed(self._asks), prompt)
