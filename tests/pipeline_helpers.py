"""A small guarded world: a tiny model with its kit (second moment, SAEs, control text, policy) in its own cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, build_folder

from guardedit.audit.tracking import prepare
from guardedit.config import Settings
from guardedit.models import sources
from guardedit.models.control import prepared_folder
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook, mlp_hook
from guardedit.pipeline import Guard, monitoring
from guardedit.pipeline.kit import kit_folder, write_kit
from guardedit.pipeline.preparing import collect_statistics
from guardedit.records import EditRequest
from guardedit.risk.neighbours import ProbeSizes
from guardedit.saes import checkpoints
from guardedit.saes.cards import Labels, LatentLabel, QualityCard

LAYER = 1
ZERO = "sha256:" + "0" * 64
CLOSED_PORT = "http://127.0.0.1:9"
"""Nobody answers on the discard port."""
LIMITS: dict[str, tuple[str, float, str]] = {
    "preop/delta_norm_ratio": ("<=", 100.0, "soft"),
    "postop/far_kl": ("<=", 100.0, "hard"),
}
"""Limits that every edit of the tiny model keeps."""
SOFT = {"preop/delta_norm_ratio": ("<=", 0.0, "soft")}
"""A soft limit that no edit keeps."""
HARD = {"preop/delta_norm_ratio": ("<=", 0.0, "hard")}
"""A hard limit that no edit keeps."""
HARMFUL = {"postop/far_kl": ("<=", -1.0, "hard")}
"""A limit on the monitor's scores that no edit keeps."""
UNDECIDED = {"postop/drift_percentile": ("<=", 99.0, "hard")}
"""A score that cannot be measured here: the tiny model has no bank of real edits."""
FACTS = (
    ("Eiffel Tower", "The {} is located in the city of", "Rome"),
    ("Colosseum", "The {} is located in the city of", "Paris"),
    ("France", "The capital of {} is", "Lisbon"),
    ("Italy", "The capital of {} is", "Madrid"),
    ("Marie Curie", "The mother tongue of {} is", "Italian"),
    ("Alan Turing", "{} was born in", "Berlin"),
    ("Germany", "The capital of {} is", "Warsaw"),
    ("Spain", "The capital of {} is", "London"),
    ("Portugal", "The capital of {} is", "Paris"),
    ("England", "The capital of {} is", "Rome"),
)


def request_of(number: int = 0, **changes: Any) -> EditRequest:
    """One of ten small requests."""
    subject, prompt, target = FACTS[number]
    named = {"subject": subject, "prompt": prompt, "target_new": target, "target_true": "Oslo"}
    return EditRequest(**{**named, **changes})


def policy_text(limits: dict[str, tuple[str, float, str]] | None = None, defaults: str = "") -> str:
    """A policy with the lenient limits, and `limits` on top."""
    rules = [
        f'[[rule]]\nid = "rule-{number}"\nmetric = "{metric}"\nop = "{op}"\nlimit = {limit}\nlevel = "{level}"\n'
        f'sentence = "{metric} is {{value}}; the limit is {{limit}}."\n'
        for number, (metric, (op, limit, level)) in enumerate({**LIMITS, **(limits or {})}.items())
    ]
    return f'version = 1\nname = "test"\n[defaults]\n{defaults}\n' + "\n".join(rules)


@dataclass(frozen=True)
class World:
    """A tiny model and everything that guarding it needs; read only, homes are made elsewhere."""

    model: Path
    cache: Path

    @property
    def kit(self) -> Path:
        """The model's kit folder."""
        return self.cache / "kits" / str(self.model.resolve()).strip("/").replace("/", "--")

    @property
    def moment(self) -> Path:
        """The second moment's file."""
        return self.kit / "second_moments" / f"{key_hook(LAYER)}.safetensors"

    @property
    def saes(self) -> tuple[Path, Path]:
        """Checkpoint folders: key space, MLP output."""
        return self.model / key_hook(LAYER), self.model / mlp_hook(LAYER)


@dataclass(frozen=True)
class Home:
    """A home in a world, and guards on it as different processes would have them."""

    world: World
    folder: Path

    def policy(self, limits: dict[str, tuple[str, float, str]], defaults: str = "") -> Path:
        """A policy file of these limits."""
        text = policy_text(limits, defaults)
        path = self.folder.parent / f"policy-{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    def guard(self, limits: dict[str, tuple[str, float, str]] | None = None, **settings: Any) -> Guard:
        """A fresh guard: it has read nothing yet. MLflow is away unless `tracking_uri` says otherwise."""
        policy = self.policy(limits) if limits else None
        named = {
            "model": str(self.world.model), "home": self.folder, "policy": policy, "tracking_uri": CLOSED_PORT,
            "reports": self.folder.parent / "reports",
        }  # fmt: skip
        return Guard(Settings(**{**named, **settings}))

    def run(self, *words: str, home: bool = True, mlflow: str | None = CLOSED_PORT) -> Ran:
        """The command line on this home and model."""
        front = ["--model", str(self.world.model), *(["--home", str(self.folder)] if home else [])]
        return run(*front, *(["--tracking-uri", mlflow] if mlflow else []), *words)

    def requests(self, *entries: Any, name: str = "requests.yaml") -> Path:
        """A requests file with these entries (JSON is YAML), or with a text as it stands."""
        path = self.folder.parent / name
        text = entries[0] if len(entries) == 1 and isinstance(entries[0], str) else json.dumps(list(entries))
        path.write_text(text, encoding="utf-8")
        return path

    def trace(self) -> dict[str, bytes]:
        """Every file of the home that is part of the record, but for locks and MLflow's."""
        skip = ("mlflow", "lock")
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not any(part.startswith(skip) or part.endswith(".lock") for part in path.parts[-2:])
            and not path.name.endswith(("-wal", "-shm"))
        }  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


def run(*words: str) -> Ran:
    """`guardedit WORDS` in this process."""
    from guardedit.cli import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["guardedit", *map(str, words)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return Ran(int(code or 0), out.getvalue(), err.getvalue())


def build_world(root: Path) -> World:
    """Make model, kit and cache under `root`, with the product's own tools."""
    world = World(build_folder("llama", root / "model", seed=3), root / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUARDEDIT_CACHE", str(world.cache))
        handle = sources.load(str(world.model))
        _write_control(prepared_folder(handle))
        texts = root / "texts.jsonl"
        _write_lines(texts, [{"text": " ".join(SENTENCES[i:] + SENTENCES[:i])} for i in range(10)])
        collect_statistics(handle, LAYER, [texts], 2000)
        assert kit_folder(str(world.model)) == world.kit
        (world.kit / "policy.toml").write_text(policy_text(), encoding="utf-8")
        rome = {"steps": 6, "learning_rate": 0.5, "contexts": ["", "It is said that. "]}
        write_kit(world.kit, layer=LAYER, hparams={"rome": rome, "finetune": {"steps": 3}})
        for hook_name, folder in zip((key_hook(LAYER), mlp_hook(LAYER)), world.saes, strict=True):
            width = handle.d_in(LAYER) if hook_name == key_hook(LAYER) else handle.d_model
            save_sae(folder, hook_name, width, handle.hook_digest(hook_name), handle)
    return world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One world a test session, whichever module asks first."""
    root = tmp_path_factory.getbasetemp() / "guarded-world"
    return World(root / "model", root / "cache") if root.is_dir() else build_world(root)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database, migrated once a session: it takes seconds."""
    path = tmp_path_factory.getbasetemp() / "empty-mlflow" / "mlflow.db"
    prepare(f"sqlite:///{path}")
    return path


@pytest.fixture
def mlflow_home(home: Home, empty_mlflow: Path) -> Home:
    """A home whose MLflow is there."""
    home.folder.mkdir()
    shutil.copyfile(empty_mlflow, home.folder / "mlflow.db")
    return home


@pytest.fixture
def home(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of its own in the world, not made yet."""
    monkeypatch.setenv("GUARDEDIT_CACHE", str(world.cache))
    smaller(monkeypatch)
    return Home(world, tmp_path / "home")


def save_sae(folder: Path, hook_name: str, width: int, upstream: str, handle: ModelHandle) -> None:
    """A hand-made JumpReLU dictionary of random unit directions, read off by their own direction."""
    n = width + 8
    draw = torch.randn(n, width, generator=torch.Generator().manual_seed(width))
    decoder = draw / draw.norm(dim=1, keepdim=True)
    weights = {
        "W_enc": decoder.T.clone(), "b_enc": torch.zeros(n), "W_dec": decoder, "b_dec": torch.zeros(width),
        "threshold": torch.full((n,), 0.05),
    }  # fmt: skip
    card = QualityCard(
        hook_name=hook_name, model_name=handle.name, d_in=width, d_sae=n, data_digest=ZERO, mix={"prose": 1.0},
        tokens=1, samples=1, held_out_tokens=1, held_out_digest=ZERO, l0=8.0, explained_variance={"all": 0.5},
        dead_share=0.0, dense_share=0.0, statistics_tokens=1, controls={"pca": 0.4}, threshold_rule="global",
        seed=0, created_with={"guardedit": "test"}, upstream_digest=upstream,
    )  # fmt: skip
    labels = Labels(hook_name=hook_name, latents=tuple(LatentLabel(label=f"`{i}`") for i in range(n)))
    stats = {"energy": torch.ones(n), "firing_rate": torch.full((n,), 0.25)}
    checkpoints.save(folder, weights, stats, card, labels, {})


def _write_control(folder: Path) -> None:
    """Control text of a model that ships none: two short domains; the others are made by rule."""
    texts = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(8)]
    _write_lines(folder / "prose.jsonl", [{"text": text} for text in texts])
    _write_lines(
        folder / "chat.jsonl", [{"prompt": f"Tell me fact {i}.", "text": t} for i, t in enumerate(texts)]
    )
    facts = [
        {"subject": subject, "prompt": prompt, "answer": target, "relation": "any", "known": True}
        for subject, prompt, target in FACTS
    ]
    _write_lines(folder / "facts.jsonl", facts)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def smaller(patch: pytest.MonkeyPatch) -> None:
    """A monitor that reads as little as it can: what is measured is tested elsewhere, here it is what follows."""
    patch.setattr(monitoring, "FAR_TOKENS", 512)
    patch.setattr(monitoring, "MONITOR_SIZES", ProbeSizes(subject=8, near=8, entailed=1, target=1))


@contextlib.contextmanager
def flipped(path: Path, offset: int, mask: int = 1) -> Iterator[None]:
    """The file with one byte changed; as it was afterwards."""
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[offset % len(whole)] ^= mask
    path.write_bytes(bytes(changed))
    try:
        yield
    finally:
        path.write_bytes(whole)
