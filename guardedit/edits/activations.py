"""Edits that leave every weight alone and act on activations, by hooks: what they are, and putting them in force.

An `ActivationChange` is one *action* (add ΔW x, or push in a direction) at the positions that a *rule* picks, in
segments in which a *gate* fires. It is a value with bytes of its own: those are saved, digested and approved as a
weight's bytes are. `docs/activations.md` says how decisions are made and held.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from guardedit.edits.acting import Acting
from guardedit.edits.activation_bytes import pack, unpack
from guardedit.edits.activation_parts import Action, Everywhere, Gate, KeyMatch, Move, Push, TokenMatch, Where
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.models import installed as registry
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import HookPoint, key_hook, rewrite_hook
from guardedit.models.installed import deciding
from guardedit.records import is_activation

__all__ = [
    "ActivationChange", "Everywhere", "Gate", "KeyMatch", "Move", "Push", "TokenMatch", "check_fit", "deciding",
    "install", "installed", "is_activation", "uninstall",
]  # fmt: skip

_NO_BOUND = 1_000_000
"""More layers than any model has: a hook name is parsed before it is known which model it is for."""


@dataclass(frozen=True, eq=False)
class ActivationChange:
    """One activation edit. Raises BadRequestError for parts that do not fit together or are not finite."""

    layer: int
    action: Action
    where: Where = field(default_factory=Everywhere)
    gate: Gate | None = None
    label: str = ""
    """For people."""

    def __post_init__(self) -> None:
        if type(self.layer) is not int or self.layer < 0:
            raise BadRequestError(f"an activation edit at layer {self.layer!r}: give a layer's number")
        _check_places(self)

    @cached_property
    def data(self) -> bytes:
        """`to_bytes`, made once."""
        return pack(self.layer, self.action, self.where, self.gate, self.label)

    def to_bytes(self) -> bytes:
        """All about the edit as the bytes of a safetensors file; equal edits give equal bytes."""
        return self.data

    @classmethod
    def from_bytes(cls, data: bytes) -> ActivationChange:
        """The edit of such bytes. IntegrityError for bytes that `to_bytes` did not write."""
        try:
            change = cls(*unpack(data))
        except BadRequestError as error:
            raise IntegrityError(f"the bytes of an activation edit cannot be read: {error}") from error
        # The name follows from the bytes as they are stored.
        vars(change)["data"] = bytes(data)
        return change

    @cached_property
    def parameter(self) -> str:
        """`activation.<lowest layer>.<16 hex digits of its bytes' sha256>`: the name it goes by in manifests."""
        return f"activation.{self.lowest_layer}.{hashlib.sha256(self.data).hexdigest()[:16]}"

    @property
    def lowest_layer(self) -> int:
        """The lowest block that it reads or acts in. What lies before a block is the one before's affair."""
        points = (*self.looks_at, self.acts_at)
        return min(max(0, point.layer - (point.point == "hook_resid_pre")) for point in points)

    @property
    def acts_at(self) -> HookPoint:
        """Where it acts."""
        named = self.action.hook_name if isinstance(self.action, Push) else rewrite_hook(self.layer)
        return HookPoint.parse(named, _NO_BOUND)

    @property
    def looks_at(self) -> tuple[HookPoint, ...]:
        """Where it reads in the pass that it acts in: the gate's hook, and the rewrite module for a rule that reads its
        input."""
        named = [self.gate.hook_name] if self.gate is not None and self.looks_ahead is None else []
        # The module's own input, as it is once all hooks on it have run: the key that its weight sees.
        named += [rewrite_hook(self.layer)] if isinstance(self.where, KeyMatch) else []
        return tuple(HookPoint.parse(name, _NO_BOUND) for name in named)

    @property
    def gate_at(self) -> HookPoint | None:
        """Where the gate reads."""
        return None if self.gate is None else HookPoint.parse(self.gate.hook_name, _NO_BOUND)

    @property
    def looks_ahead(self) -> HookPoint | None:
        """Where the gate reads, if that is computed after the edit acts: the prompt is then read once before."""
        point = self.gate_at
        return point if point is not None and point > self.acts_at else None

    @property
    def moves(self) -> bool:
        """Whether it adds ΔW x, as an update of the layer's rewrite module would."""
        return isinstance(self.action, Move)

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖ or ‖direction‖."""
        moved = self.action
        found = moved.update.dense().norm() if isinstance(moved, Move) else moved.direction.double().norm()
        return float(found)

    @property
    def rank(self) -> int | None:
        """Rank of ΔW; 1 of a push."""
        return self.action.update.rank if isinstance(self.action, Move) else 1


def install(handle: ModelHandle, change: ActivationChange) -> None:
    """Put an edit in force in the handle's model, until `uninstall`; `model.generate` follows it too.

    Raises BadRequestError where it does not fit the model or is installed already.
    """
    check_fit(handle, change)
    registry.put(handle, Acting(change))


def uninstall(handle: ModelHandle, parameter: str) -> ActivationChange:
    """Take an edit out by its name and return it; every hook of it is gone. BadRequestError where it is not there."""
    return _change_of(registry.drop(handle, parameter))


def installed(handle: ModelHandle) -> dict[str, ActivationChange]:
    """The edits in force, by name, in the order of their names."""
    return {name: _change_of(edit) for name, edit in registry.edits_of(handle).items()}


def _change_of(edit: registry.Edit) -> ActivationChange:
    change: ActivationChange = edit.change  # type: ignore[attr-defined]
    return change


def _check_places(change: ActivationChange) -> None:
    """An action lies in its layer, fits its rule, and comes behind all that its edit reads in the same pass."""
    acts, action = change.acts_at, change.action
    if acts.layer != change.layer and isinstance(action, Push):
        raise BadRequestError(
            f"an edit of layer {change.layer} pushes at {action.hook_name}; name that layer"
        )
    if isinstance(action, Move) and isinstance(change.where, KeyMatch):
        size, width = len(change.where.read_out), action.update.shape[1]
        if size != width:
            raise BadRequestError(
                f"the rule reads keys of {size} entries, the update those of {width}; both read layer {change.layer}"
            )
    late = [point for point in change.looks_at if point > acts]
    if late:
        raise BadRequestError(
            f"the edit acts at {acts.point} of layer {acts.layer} and reads {late[0].point} of layer {late[0].layer}, "
            "which is computed later; its rule must read no later than the edit acts"
        )


def check_fit(handle: ModelHandle, change: ActivationChange) -> None:
    """Raise BadRequestError unless the model has the places, with as many entries as the edit's vectors."""
    action, where, gate = change.action, change.where, change.gate
    keys, values = key_hook(change.layer), rewrite_hook(change.layer)
    wanted = [("the update's rows", values, len(action.update.left))] if isinstance(action, Move) else []
    wanted += [("the update's columns", keys, action.update.shape[1])] if isinstance(action, Move) else []
    wanted += [("the direction", action.hook_name, len(action.direction))] if isinstance(action, Push) else []
    wanted += [("the rule's read-out", keys, len(where.read_out))] if isinstance(where, KeyMatch) else []
    wanted += [("the gate", gate.hook_name, gate.w_enc.shape[1])] if gate is not None else []
    for what, hook_name, size in wanted:
        point = HookPoint.parse(hook_name, handle.n_layers)
        width = handle.d_in(point.layer) if point.point == "mlp.hook_post" else handle.d_model
        if size != width:
            raise BadRequestError(
                f"{what} of {change.parameter} has {size} entries, {hook_name} of {handle.name} has {width}: the edit "
                "was made for another model"
            )
