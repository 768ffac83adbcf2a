"""An activation edit as the bytes of a safetensors file: its tensors, and `about`, canonical JSON as uint8."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from guardedit.edits.activation_parts import Action, Everywhere, Gate, KeyMatch, Move, Push, TokenMatch, Where
from guardedit.edits.updates import LowRank
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.records import canonical

Parts = tuple[int, Action, Where, Gate | None, str]
"""Layer, action, rule, gate, label."""
_FORMAT = 1
_GATE_WORDS = frozenset(("hook_name", "bias", "limit", "labels", "latents", "pool", "rooted"))
_GATE_TENSORS = ("w_enc", "b_enc", "threshold", "b_dec", "weights")
_RIVAL_TENSORS = ("rivals", "rival_bias")
"""Of gates with rivals alone: what is said of others, and so their digests, is as it was before there were any."""


def pack(layer: int, action: Action, where: Where, gate: Gate | None, label: str) -> bytes:
    """The bytes of an edit; equal edits give equal bytes."""
    about = {
        "format": _FORMAT,
        "layer": layer,
        "label": label,
        "action": _about_action(action),
        "where": _about_where(where),
        "gate": None if gate is None else _about_gate(gate),
    }
    tensors = {"about": torch.frombuffer(bytearray(canonical(about)), dtype=torch.uint8)}
    tensors |= {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in _tensors(action, where, gate)
    }
    return save_bytes(tensors)


def _tensors(action: Action, where: Where, gate: Gate | None) -> list[tuple[str, Tensor]]:
    if isinstance(action, Move):
        found = [("action.left", action.update.left), ("action.right", action.update.right)]
    else:
        found = [("action.direction", action.direction)]
    if isinstance(where, KeyMatch):
        found.append(("where.read_out", where.read_out))
    if gate is not None:
        found += list(_gate_tensors(gate).items())
    return found


def _gate_tensors(gate: Gate) -> dict[str, Tensor]:
    names = _GATE_TENSORS if gate.rivals is None else _GATE_TENSORS + _RIVAL_TENSORS
    return {f"gate.{name}": getattr(gate, name) for name in names}


def _about_action(action: Action) -> dict[str, Any]:
    if isinstance(action, Move):
        return {"kind": "move"}
    return {"kind": "push", "hook_name": action.hook_name, "beta": float(action.beta)}


def _about_where(where: Where) -> dict[str, Any]:
    if isinstance(where, KeyMatch):
        return {"kind": "key", "least": float(where.least)}
    if isinstance(where, TokenMatch):
        return {"kind": "tokens", "sequences": [list(one) for one in where.sequences]}
    return {"kind": "everywhere"}


def _about_gate(gate: Gate) -> dict[str, Any]:
    rivals = {} if gate.rivals is None else {"rival_names": list(gate.rival_names)}
    return rivals | {
        "hook_name": gate.hook_name,
        "bias": float(gate.bias),
        "limit": float(gate.limit),
        "labels": list(gate.labels),
        "latents": list(gate.latents),
        "pool": gate.pool,
        "rooted": gate.rooted,
    }


def unpack(data: bytes) -> Parts:
    """The parts of an edit. IntegrityError for bytes that `pack` did not write."""
    try:
        tensors = load_bytes(data)
        about = json.loads(tensors.pop("about").numpy().tobytes())
        if about.pop("format") != _FORMAT:
            raise ValueError("another format")
        parts = _parts(about, tensors)
        if about or tensors:
            raise ValueError(f"{sorted([*about, *tensors])} belong to nothing")
    except (SafetensorError, BadRequestError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"the bytes of an activation edit cannot be read: {error}") from error
    return parts


def _parts(about: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    """Takes out of both what it uses: what is left belongs to nothing."""
    layer, label, gate = about.pop("layer"), about.pop("label"), about.pop("gate")
    if type(layer) is not int or type(label) is not str:
        raise ValueError("layer and label are a number and a text")
    action, where = _action(about.pop("action"), tensors), _where(about.pop("where"), tensors)
    return layer, action, where, None if gate is None else _gate(gate, tensors), label


def _action(about: dict[str, Any], tensors: dict[str, Tensor]) -> Action:
    if about == {"kind": "move"}:
        return Move(LowRank(tensors.pop("action.left"), tensors.pop("action.right")))
    _only(about, "push", {"hook_name", "beta"})
    return Push(str(about["hook_name"]), tensors.pop("action.direction"), about["beta"])


def _where(about: dict[str, Any], tensors: dict[str, Tensor]) -> Where:
    if about == {"kind": "everywhere"}:
        return Everywhere()
    if about["kind"] == "tokens":
        _only(about, "tokens", {"sequences"})
        return TokenMatch(tuple(tuple(one) for one in about["sequences"]))
    _only(about, "key", {"least"})
    return KeyMatch(tensors.pop("where.read_out"), about["least"])


def _gate(about: dict[str, Any], tensors: dict[str, Tensor]) -> Gate:
    rivals = "rival_names" in about
    if about.keys() - {"rival_names"} != _GATE_WORDS:
        raise ValueError(f"a gate of {sorted(about)}")
    wanted = _GATE_TENSORS + (_RIVAL_TENSORS if rivals else ())
    parts: dict[str, Any] = {name: tensors.pop(f"gate.{name}") for name in wanted}
    lists = ("labels", "latents", "rival_names") if rivals else ("labels", "latents")
    parts |= {name: tuple(about.pop(name)) for name in lists}
    return Gate(**parts, **about)


def gate_tensors(gate: Gate) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A gate by itself: what is said of it, and its tensors by name."""
    tensors = {name: one.detach().cpu().clone().contiguous() for name, one in _gate_tensors(gate).items()}
    return _about_gate(gate), tensors


def gate_from(about: dict[str, Any], tensors: dict[str, Tensor]) -> Gate:
    """The gate that `gate_tensors` wrote. ValueError, KeyError or BadRequestError for anything else."""
    return _gate(about, tensors)


def _only(about: dict[str, Any], kind: str, names: set[str]) -> None:
    if about.keys() != {"kind", *names} or about["kind"] != kind:
        raise ValueError(f"{about} is no {kind}")
