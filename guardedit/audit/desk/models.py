"""The registered model: one version for each committed edit, which holds the edit's delta and not the model.

Aliases say what is live: `production` is the last edit that stands, `previous` the one before it. A version's source is
a folder that MLflow's pyfunc loads from code, so nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardedit.audit.words import hand, visible
from guardedit.records import AuditReport, canonical

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

FOLDER = "delta_model"
_CODE = "delta_model.py"
_ALIASES = ("production", "previous")


@dataclass(frozen=True)
class Shelf:
    """A registered model as it stands: version by plan, tags by plan, aliases."""

    name: str
    versions: dict[str, str]
    tags: dict[str, dict[str, str]]
    aliases: dict[str, str]


def registered_name(model_name: str) -> str:
    """ "guardedit.smollm2-135m": MLflow's names hold no slashes and colons."""
    return "guardedit." + re.sub(r"[^\w.-]+", "-", model_name).strip("-")


def read(client: MlflowClient, model_name: str) -> Shelf:
    """The model's shelf, empty where nothing was ever committed."""
    name = registered_name(model_name)
    found = list(client.search_registered_models(f"name = '{name}'"))
    if not found:
        return Shelf(name, {}, {}, {})
    versions, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        versions += list(page)
        token = page.token
        if not token:
            break
    told = {v.tags["guardedit.plan_id"]: v for v in versions if "guardedit.plan_id" in v.tags}
    numbers = {plan: str(v.version) for plan, v in told.items()}
    aliases = {alias: str(number) for alias, number in found[0].aliases.items()}
    return Shelf(name, numbers, {plan: dict(v.tags) for plan, v in told.items()}, aliases)


def register(client: MlflowClient, shelf: Shelf, audit: AuditReport, delta: Path, run: RunInfo) -> None:
    """Make the edit's version, or bring its tags up to date. `run` is the plan's."""
    plan_id, tags = audit.plan.plan_id, version_tags(audit)
    if plan_id in shelf.versions:
        there, number = shelf.tags[plan_id], shelf.versions[plan_id]
        for name, value in tags.items():
            if there.get(name) != value:
                client.set_model_version_tag(shelf.name, number, name, value)
        shelf.tags[plan_id] = {**there, **tags}
        return
    if not shelf.versions and not list(client.search_registered_models(f"name = '{shelf.name}'")):
        client.create_registered_model(shelf.name, {"guardedit.model": audit.plan.model_name}, _ABOUT)
    with folder_of(audit, delta) as folder:
        client.log_artifacts(run.run_id, str(folder), FOLDER)
    made = client.create_model_version(
        shelf.name, f"{run.artifact_uri}/{FOLDER}", run.run_id, tags=tags, description=_description(audit),
        await_creation_for=0,
    )  # fmt: skip
    shelf.versions[plan_id], shelf.tags[plan_id] = str(made.version), tags


def point(client: MlflowClient, shelf: Shelf, live: tuple[str, ...]) -> None:
    """Put the aliases where the ledger says. `live`: edits that stand, oldest first."""
    known = [shelf.versions[plan] for plan in reversed(live) if plan in shelf.versions]
    wanted = dict(zip(_ALIASES, known, strict=False))
    for alias in _ALIASES:
        if alias in wanted and shelf.aliases.get(alias) != wanted[alias]:
            client.set_registered_model_alias(shelf.name, alias, wanted[alias])
        elif alias not in wanted and alias in shelf.aliases:
            client.delete_registered_model_alias(shelf.name, alias)


def version_tags(audit: AuditReport) -> dict[str, str]:
    """What the gate said of this edit; digests are whole."""
    judged = audit.postop or audit.plan.judgement
    found = {
        "plan_id": audit.plan.plan_id,
        "outcome": audit.outcome,
        "verdict": judged.verdict,
        "editor": audit.plan.editor,
        "approver": audit.decision.approver if audit.decision else "",
        "decided_by": hand(audit.decision) if audit.decision else "",
        "plan_digest": audit.plan_digest,
        "base_digest": audit.plan.model_digest,
        "delta_digest": audit.plan.delta.file_digest,
    }
    return {f"guardedit.{name}": visible(str(value))[:5000] for name, value in found.items() if value}


_ABOUT = (
    "Edits of one model, one version each. A version holds the edit's delta and loads only on the base whose digest "
    "it names. The ledger is the record; `guardedit sync` rebuilds this."
)


def _description(audit: AuditReport) -> str:
    return (
        f"Holds the delta of plan {audit.plan.plan_id}, for the base {audit.plan.model_digest}; any other base is "
        "refused."
    )


@contextlib.contextmanager
def folder_of(audit: AuditReport, delta: Path) -> Iterator[Path]:
    """The version's folder in MLflow's form, equal bytes for equal edits; gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / "artifacts").mkdir()
        shutil.copyfile(delta, made / "artifacts" / "delta.safetensors")
        (made / "artifacts" / "plan.json").write_bytes(canonical(audit.plan))
        for name, data in _mould().items():
            (made / name).write_bytes(data)
        _settle(made, audit)
        yield made


@lru_cache(maxsize=1)
def _mould() -> dict[str, bytes]:
    """What is the same in every version, by file name: MLflow takes a second to save a model, so it saves one."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "given", Path(scratch) / "made"
        given.mkdir()
        for name in ("delta.safetensors", "plan.json"):
            (given / name).write_bytes(b"")
        _save(made, given)
        return {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}


def _save(made: Path, given: Path) -> None:
    import mlflow.pyfunc

    code = files("guardedit") / "assets" / "desk" / _CODE
    with as_file(code) as file, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            str(made),
            python_model=str(file),
            artifacts={"delta": str(given / "delta.safetensors"), "plan": str(given / "plan.json")},
            pip_requirements=[f"guardedit=={version('guardedit')}"],
            model_config={"base": None, "tokens": 20},
        )


def _settle(folder: Path, audit: AuditReport) -> None:
    """No paths of this machine, no clock, no random name; the size is that of this version."""
    import yaml

    file = folder / "MLmodel"
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    flavour = found["flavors"]["python_function"]
    flavour["model_code_path"] = Path(flavour["model_code_path"]).name
    for part in flavour["artifacts"].values():
        part["uri"] = Path(part["path"]).name
    held = [folder / _CODE, *(folder / "artifacts").iterdir()]
    found["model_size_bytes"] = sum(path.stat().st_size for path in held)
    found["model_uuid"] = audit.plan_digest.removeprefix("sha256:")[:32]
    found["utc_time_created"] = audit.plan.created
    file.write_text(yaml.safe_dump(found, sort_keys=True), encoding="utf-8")
