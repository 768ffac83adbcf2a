"""Activation edits in force in a model: one registry on the model, and the hooks that it needs, no more.

The registry and its hooks live on the model object, so that a deep copy of a model is edited as the model was and is
its own from then on. The last edit that goes takes all of it along. Edits act before any other hook, as if they were
part of the module; at one place all of them look first and then act in the order of their names, so that the order in
which they were installed does not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.ahead import Ahead, ahead_of
from guardedit.models.edit_hooks import Begin, End, Generate, attach_at
from guardedit.models.hooks import HookPoint
from guardedit.models.passes import Held, Pass, named_arguments, read_pass, remember
from guardedit.models.turns import Ids, turn_marker

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle

_ATTRIBUTE = "_activation_edits"


class Running(Protocol):
    """One edit during one forward pass."""

    silent: bool
    """Known to move nothing: it is not asked any more."""
    settled: bool
    """Whether it acts in this pass at all is known, or does not hang on a gate."""

    def look(self, point: HookPoint, activation: Tensor, given: Tensor) -> None:
        """Read an activation (rows, seq, d), or what the module at the point was given."""
        ...

    def act(self, activation: Tensor, given: Tensor) -> Tensor:
        """The activation as the edit makes it; the same object where nothing is moved."""
        ...

    def decision(self) -> Held | None:
        """What to remember beside the cache; None where nothing was decided."""
        ...


class Edit(Protocol):
    """An edit that acts on activations."""

    @property
    def parameter(self) -> str:
        """The name it goes by in manifests."""
        ...

    @property
    def data(self) -> bytes:
        """The bytes that say all about it."""
        ...

    @property
    def looks_at(self) -> tuple[HookPoint, ...]:
        """Where it reads in the pass that it acts in."""
        ...

    @property
    def looks_ahead(self) -> HookPoint | None:
        """Where its gate reads, if that is computed after it acts: the prompt is then read once before."""
        ...

    @property
    def acts_at(self) -> HookPoint:
        """Where it acts; no later than where it reads last."""
        ...

    def begin(self, facts: Pass) -> Running:
        """The edit in one pass."""
        ...


@dataclass
class _Thread:
    """What one thread is doing with the model: two may generate at once."""

    running: dict[str, Running] | None = None
    """None outside a forward pass."""
    acting: dict[str, Running] = field(default_factory=dict)
    """Those of `running` that were not silent from the start."""
    shape: tuple[int, ...] = ()
    cache: Any = None
    deciding: Tensor | None = None
    prompt_width: int | None = None


@dataclass(eq=False)
class Registry:
    """The edits of one model by name, and its hooks."""

    marker: Ids
    edits: dict[str, Edit] = field(default_factory=dict)
    _threads: dict[int, _Thread] = field(default_factory=dict)
    _hooks: dict[HookPoint, Any] = field(default_factory=dict)
    _model_hooks: list[Any] = field(default_factory=list)
    _ahead: Ahead | None = None

    @property
    def thread(self) -> _Thread:
        """The present thread's state."""
        return self._threads.setdefault(threading.get_ident(), _Thread())

    def attach(self, handle: ModelHandle) -> None:
        """Bring hooks to what the edits need, each in front of all others at its place."""
        self.detach()
        if not self.edits:
            return
        base: Any = handle.model.base_model
        self._model_hooks = [
            base.register_forward_pre_hook(Begin(self), prepend=True, with_kwargs=True),
            base.register_forward_hook(End(self), always_call=True),
        ]
        ahead = {edit.looks_ahead for edit in self.edits.values()}
        self._ahead = ahead_of(handle, [point for point in ahead if point is not None])
        self.to_front(handle)

    def to_front(self, handle: ModelHandle) -> None:
        """Put the edits' hooks before hooks that were entered in front of them meanwhile."""
        for hook in self._hooks.values():
            hook.remove()
        places = {point for edit in self.edits.values() for point in (*edit.looks_at, edit.acts_at)}
        self._hooks = {point: attach_at(handle, point, self) for point in places}

    def detach(self) -> None:
        """Remove all hooks."""
        for hook in (*self._hooks.values(), *self._model_hooks):
            hook.remove()
        self._hooks, self._model_hooks, self._ahead = {}, [], None

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        thread = self.thread
        thread.running = None
        facts = read_pass(
            module, args, kwargs, self.marker, deciding=thread.deciding, prompt_width=thread.prompt_width
        )
        thread.cache, thread.shape = facts.cache, tuple(facts.ids.shape)
        running = {name: self.edits[name].begin(facts) for name in sorted(self.edits)}
        self._look_ahead(running, facts, {**named_arguments(module, args), **kwargs})
        thread.running = running
        thread.acting = {name: one for name, one in thread.running.items() if not one.silent}

    def _look_ahead(self, running: Mapping[str, Running], facts: Pass, given: Mapping[str, Any]) -> None:
        """Settle the gates that read above their edits, from a pass of their own: no edit acts in it."""
        asking = {
            name: point
            for name, one in running.items()
            if not (one.settled or one.silent) and (point := self.edits[name].looks_ahead) is not None
        }
        if not asking or self._ahead is None:
            return
        seen = self._ahead.read(given, facts.cache if facts.cached else None)
        for name, point in asking.items():
            running[name].look(point, seen[point], seen[point])

    def end(self, output: Any) -> None:
        """A forward pass has ended, or was broken off (then there is no output)."""
        thread = self.thread
        running, cache = thread.running or {}, thread.cache
        thread.running = thread.cache = None
        if output is None:
            return
        decided = {name: one.decision() for name, one in running.items()}
        known = {name: held for name, held in decided.items() if held is not None}
        if known:
            remember(cache if cache is not None else _cache_in(output), known)

    def at(self, point: HookPoint, activation: Tensor, given: Tensor) -> Tensor:
        """What the edits make of an activation."""
        thread = self.thread
        # A module called by itself, outside a pass, has no tokens and no prompt.
        if thread.running is None or not thread.acting:
            return activation
        if tuple(activation.shape[:2]) != thread.shape:
            raise BadRequestError(
                f"an activation edit at {point.point} of layer {point.layer} is shown {list(activation.shape[:2])} of "
                f"the {list(thread.shape)} rows and positions of this forward pass; run it on whole rows"
            )
        for name, running in thread.acting.items():
            if not running.silent and point in self.edits[name].looks_at:
                running.look(point, activation, given)
        for name, running in thread.acting.items():
            if not running.silent and point == self.edits[name].acts_at:
                activation = running.act(activation, given)
        return activation


def _cache_in(output: Any) -> Any:
    """The key-value cache among a base model's outputs, or None."""
    found = getattr(output, "past_key_values", None)
    parts = output if isinstance(output, tuple) else ()
    return found if found is not None else next((p for p in parts if hasattr(p, "get_seq_length")), None)


def registry_of(handle: ModelHandle) -> Registry | None:
    """The registry of the handle's model, where an edit is installed."""
    found: Registry | None = vars(handle.model).get(_ATTRIBUTE)
    return found


def edits_of(handle: ModelHandle) -> dict[str, Edit]:
    """Installed edits by name, in the order of their names."""
    registry = registry_of(handle)
    return {} if registry is None else dict(sorted(registry.edits.items()))


def put(handle: ModelHandle, edit: Edit) -> None:
    """Install an edit. BadRequestError where one of that name is there."""
    registry = registry_of(handle)
    if registry is None:
        registry = vars(handle.model)[_ATTRIBUTE] = Registry(turn_marker(handle.tokenizer))
        own = vars(handle.model).get("generate")
        vars(handle.model)["generate"] = Generate(registry, handle.model, own)
    if edit.parameter in registry.edits:
        raise BadRequestError(f"{edit.parameter} is installed in {handle.name} already")
    registry.edits[edit.parameter] = edit
    registry.attach(handle)


def drop(handle: ModelHandle, parameter: str) -> Edit:
    """Take an edit out; with the last one every trace goes. BadRequestError where there is none of that name."""
    registry = registry_of(handle)
    if registry is None or parameter not in registry.edits:
        known = ", ".join(edits_of(handle)) or "none"
        raise BadRequestError(f"{parameter} is not installed in {handle.name}; installed: {known}")
    edit = registry.edits.pop(parameter)
    registry.attach(handle)
    if not registry.edits:
        _clear(handle.model)
    return edit


def _clear(model: Any) -> None:
    generate = vars(model).pop("generate")
    if generate.before is not None:
        vars(model)["generate"] = generate.before
    del vars(model)[_ATTRIBUTE]


@contextmanager
def deciding(handle: ModelHandle, mask: Tensor) -> Iterator[None]:
    """Inside, gates decide from the positions of `mask` (rows, seq, boolean) alone, in passes of that shape.

    For rows of a prompt with a target behind it: mark the prompt, and the target is answered as in generation.
    """
    registry = registry_of(handle)
    if registry is None:
        yield
        return
    thread = registry.thread
    outer, thread.deciding = thread.deciding, mask
    try:
        yield
    finally:
        thread.deciding = outer


def whole_from(handle: ModelHandle, layer: int) -> int:
    """The highest block, `layer` at most, from which a pass may be resumed with every installed edit being whole.

    An edit that reads below a block and acts in it or above would miss what it reads.
    """
    while True:
        cut = [_span(edit) for edit in edits_of(handle).values()]
        lower = [first for first, last in cut if first < layer <= last]
        if not lower:
            return layer
        layer = min(lower)


def _span(edit: Edit) -> tuple[int, int]:
    """First and last block of an edit. What lies before a block is a matter of the block before it."""
    points = (*edit.looks_at, edit.acts_at)
    blocks = [max(0, point.layer - (point.point == "hook_resid_pre")) for point in points]
    return min(blocks), max(point.layer for point in points)
