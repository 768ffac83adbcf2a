"""One home: its live model, plans, ledger and versions. The order of the steps lies in planning and applying."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from guardedit.audit.ledger import Entry, Ledger
from guardedit.audit.versions import VersionStore
from guardedit.config import Settings, current_user, key_passphrase
from guardedit.edits.deltas import EditDelta, decode, restore, saved
from guardedit.errors import IntegrityError, NotFoundError, StaleError
from guardedit.gate.states import Event, State, replay
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import load
from guardedit.pipeline.kit import MAPS, Kit, full_name, load_kit
from guardedit.records import Decision, Plan, parse_record

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8,
}  # fmt: skip
"""U8 are the bytes of an activation edit."""


def _silent(_: str, __: float) -> None:
    """No progress display."""


def _nobody(_: str) -> str | None:
    """Nobody is there to be asked for a passphrase: it is in the environment, or not known."""
    return key_passphrase()


class Workspace:
    """A guarded model. Making one reads nothing; the model is loaded when it is first needed."""

    def __init__(self, settings: Settings | None = None, progress: Progress | None = None) -> None:
        self.settings = settings or Settings()
        self.progress: Progress = progress or _silent
        self.home = self.settings.home
        self.ledger = Ledger(self.home / "ledger.sqlite")
        self.store = VersionStore(self.home)
        self.ask: Callable[[str], str | None] = _nobody
        """What asks for the passphrase of an encrypted key, by the key's name."""
        self._at: str | None = None
        """Digest of the version that the loaded model was last brought to."""

    # -- the model

    @cached_property
    def handle(self) -> ModelHandle:
        """The live model: the base's files with the bytes of committed edits on top, every digest compared."""
        self.progress(f"loading {self.settings.model}", 0.0)
        handle = load(full_name(self.settings.model), device_map=self.settings.device_map)
        if self.store.exists:
            base, digest = self.store.base(), handle.digest()
            if base.digest != digest:
                raise StaleError(
                    f"{self.home} guards {base.name} ({base.digest}), {self.settings.model} is {digest}; "
                    "use another --home"
                )
            restore(handle, {name: self.tensor(name) for name in self.store.live_overrides()})
            self._compare(handle)
        return handle

    @cached_property
    def kit(self) -> Kit:
        """Statistics, SAEs, maps, policy and banks of the model; the home's own maps come first."""
        base = self.store.base().manifest if self.store.exists else self.handle.manifest()
        return load_kit(self.handle, self.settings.policy, base, own_maps=self.home / MAPS)

    def tensor(self, parameter: str, edit_version: str | None = None) -> Tensor:
        """A stored tensor of the live version, or of a named one ("base", an edit's id); its digest is compared."""
        raw = self.store.read(parameter, edit_version)
        return tensor_from(raw.data, raw.dtype, raw.shape)

    def _compare(self, handle: ModelHandle) -> None:
        found, live = handle.digest(), self.store.digest()
        if found != live:
            raise IntegrityError(f"the loaded model is {found}, the live version is {live}")
        self._at = live

    def refresh(self) -> None:
        """Bring the loaded model, if it is loaded, to what is live on disk: here or elsewhere, somebody may have
        committed or undone an edit."""
        if "handle" not in vars(self) or not self.store.exists or self.store.digest() == self._at:
            return
        live = self.store.manifest()
        here = self.handle.manifest()
        stale = [name for name in here.keys() | live.keys() if live.get(name) != here.get(name)]
        restore(self.handle, {name: self.tensor(name) for name in stale})
        self._compare(self.handle)

    @contextmanager
    def staged(self, edit_id: str) -> Iterator[ModelHandle]:
        """The staged copy, read back from its bytes on disk; the live model's bytes are back afterwards."""
        version_ = self.store.staged(edit_id)
        spans = {t.parameter: t for t in version_.record.tensors}
        kept = saved(self.handle, spans)
        images = {
            name: tensor_like(kept[name], (version_.folder / "post" / f"{name}.bin").read_bytes())
            for name in spans
        }
        try:
            restore(self.handle, images)
            if self.handle.digest() != version_.digest:
                raise IntegrityError(f"the staged copy of {edit_id} is not {version_.digest}")
            yield self.handle
        finally:
            restore(self.handle, kept)

    # -- plans and their history

    def plan_folder(self, plan_id: str) -> Path:
        """Where a plan lies; raises NotFoundError for a name that cannot be one."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", plan_id):
            raise NotFoundError(f"{plan_id[:80]!r} is not a plan's name; `guardedit status` lists them")
        return self.home / "plans" / plan_id

    def plan_entry(self, plan_id: str) -> Entry:
        """The ledger's entry of a plan; raises NotFoundError."""
        self.plan_folder(plan_id)
        found = self.ledger.entries("planned", plan_id=plan_id)
        if not found:
            known = [e.body["plan_id"] for e in self.ledger.entries("planned")]
            hint = (
                f"there are {', '.join(known[-5:])}"
                if known
                else "there is none yet; make one with `guardedit plan`"
            )
            raise NotFoundError(f"no plan {plan_id!r} in {self.home}; {hint}")
        return found[-1]

    def read_plan(self, plan_id: str) -> Plan:
        """A plan, its bytes compared with the digest in the ledger."""
        expected = str(self.plan_entry(plan_id).body["plan_digest"])
        path = self.plan_folder(plan_id) / "plan.json"
        return parse_record(Plan, self._bytes(path), expected=expected, what=f"plan {plan_id}")

    def read_delta(self, plan: Plan) -> EditDelta:
        """A plan's solved update, its bytes compared with the digest in the plan."""
        return decode(self._bytes(self.plan_folder(plan.plan_id) / "delta.safetensors"), plan.delta)

    def _bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path.name} of {path.parent.name} is gone: {error.strerror}") from error

    def history(self, plan_id: str) -> tuple[Entry, ...]:
        """Everything on record about one plan, in order."""
        return self.ledger.entries(plan_id=plan_id)

    def state(self, plan_id: str) -> State:
        """Where the plan stands: its recorded events, replayed through the transition table."""
        return replay(e.body["event"] for e in self.history(plan_id) if e.body.get("event"))

    def states(self) -> dict[str, State]:
        """Where every plan stands, in the order in which they were made; the ledger is read once."""
        events: dict[str, list[Event]] = {}
        for entry in self.ledger.entries():
            plan_id, event = entry.body.get("plan_id"), entry.body.get("event")
            if plan_id and event:
                events.setdefault(plan_id, []).append(event)
        return {plan_id: replay(told) for plan_id, told in events.items()}

    def decision(self, plan_id: str) -> Decision | None:
        """The last word on a plan, or None; the policy's own stands in the plan's first entry."""
        words = [e.body["decision"] for e in self.history(plan_id) if e.body.get("decision")]
        return Decision.model_validate(words[-1]) if words else None

    # -- facts on record

    def now(self) -> datetime:
        """Wall time, UTC: information, never order."""
        return datetime.now(UTC)

    @property
    def user(self) -> str:
        """Who is at the keyboard."""
        return current_user()


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    named = {name: version(name) for name in ("guardedit", "torch", "transformers")}
    return {**named, "python": platform.python_version()}


def tensor_from(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of raw little-endian bytes; `dtype` is safetensors' word."""
    if dtype not in _DTYPES:
        raise IntegrityError(f"a stored tensor has the type {dtype!r}; known are {', '.join(_DTYPES)}")
    return _from_bytes(data, _DTYPES[dtype]).reshape(shape)


def tensor_like(tensor: Tensor, data: bytes) -> Tensor:
    """Raw bytes as a tensor of the same type and shape; those of an activation edit may be more than there were."""
    found = _from_bytes(data, tensor.dtype)
    return found if tensor.dtype == torch.uint8 else found.reshape(tensor.shape)


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
