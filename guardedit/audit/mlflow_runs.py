"""Writing one edit into MLflow's runs. Every function may be called again with the same record and changes nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardedit.audit import mlflow_content as content
from guardedit.audit.plots import draw
from guardedit.audit.report import render, sheet_of
from guardedit.audit.words import visible
from guardedit.records import AuditReport, canonical

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def find_runs(client: MlflowClient, experiment: str, plan_id: str) -> dict[str, Run]:
    """The runs of a plan by stage; the oldest, should there be two."""
    runs = client.search_runs(
        [experiment], f"tags.`guardedit.plan_id` = '{plan_id}'", order_by=["attributes.start_time DESC"]
    )
    return {run.data.tags.get("guardedit.stage", ""): run for run in runs}


def run_of(
    client: MlflowClient,
    experiment: str,
    audit: AuditReport,
    stage: content.Stage,
    known: dict[str, Run],
    parent: Run | None = None,
) -> Run:
    """The run of a stage, created if there is none."""
    if stage in known:
        return known[stage]
    tags = {
        "guardedit.plan_id": audit.plan.plan_id,
        "guardedit.stage": stage,
        "mlflow.user": visible(audit.plan.author),
        "mlflow.source.name": "guardedit",
        **({"mlflow.parentRunId": parent.info.run_id} if parent else {}),
    }
    name = content.run_name(audit) if stage == "plan" else stage
    return client.create_run(experiment, content.milliseconds(audit.plan.created), tags, name)


def tags_of(tags: dict[str, str]) -> list[Any]:
    """Tags as MLflow takes them."""
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in tags.items()]


def _numbers(numbers: dict[str, float], audit: AuditReport) -> list[Any]:
    from mlflow.entities import Metric

    at = content.milliseconds(audit.created)
    return [Metric(name, value, at, 0) for name, value in sorted(numbers.items())]


def fill(client: MlflowClient, run: Run, audit: AuditReport, report_dir: Path | None) -> None:
    """The plan's run: description, tags, parameters, every metric, tables, figures, files, inputs."""
    from mlflow.entities import Param

    run_id = run.info.run_id
    by_stage = content.metrics(audit)
    tables = content.tables(audit)
    tags = content.tags(audit) | {
        "mlflow.note.content": content.description(audit)[:7900],
        "mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in tables]),
    }
    chosen = [Param(name, value) for name, value in content.params(audit).items()]
    _batched(
        client,
        run_id,
        _numbers({k: v for m in by_stage.values() for k, v in m.items()}, audit),
        chosen,
        tags_of(tags),
    )
    _inputs(client, run_id, content.datasets(audit))
    _files(client, run_id, audit, report_dir, tables)
    close(client, run, content.status_of(audit), audit, content.run_name(audit))


def mark(client: MlflowClient, run: Run, marks: dict[str, str]) -> None:
    """Put the tags on the run that it does not have yet."""
    missing = {name: value for name, value in marks.items() if run.data.tags.get(name) != value}
    if missing:
        client.log_batch(run.info.run_id, tags=tags_of(missing))


def _batched(
    client: MlflowClient, run_id: str, numbers: list[Any], chosen: list[Any], tags: list[Any]
) -> None:
    """MLflow takes a thousand things at a time, of them a hundred parameters and a hundred tags; each time costs."""
    for n in range(max(-(-len(numbers) // 800), -(-len(chosen) // 90), -(-len(tags) // 90))):
        small = slice(90 * n, 90 * (n + 1))
        client.log_batch(run_id, numbers[800 * n : 800 * (n + 1)], chosen[small], tags[small])


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    """MLflow's table format, written whole: its own `log_table` would append on every retelling."""
    columns = list(rows[0])
    found = {"columns": columns, "data": [[row[c] for c in columns] for row in rows]}
    path.write_text(json.dumps(found, indent=2), encoding="utf-8")


def _inputs(client: MlflowClient, run_id: str, datasets: tuple[content.Dataset, ...]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    told = [
        DatasetInput(
            # MLflow keeps 36 characters of a digest; the whole one stands in the source.
            Dataset(
                d.name, d.digest.removeprefix("sha256:")[:12], "guardedit", json.dumps({"digest": d.digest})
            ),
            [InputTag("mlflow.data.context", d.context)],
        )
        for d in datasets
    ]
    if told:
        client.log_inputs(run_id, told)


def _files(
    client: MlflowClient, run_id: str, audit: AuditReport, report_dir: Path | None, tables: content.Tables
) -> None:
    """Plan, report, tables and figures, handed over together."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if report_dir is None:
            render(audit, folder)
        else:
            for name in ("report.html", "report.md", "report.json"):
                shutil.copyfile(report_dir / name, folder / name)
        (folder / "plan.json").write_bytes(canonical(audit.plan))
        for part in ("tables", "figures"):
            (folder / part).mkdir()
        for path, rows in tables.items():
            _table(folder / path, rows)
        for picture in sheet_of(audit).pictures:
            (folder / "figures" / f"{picture.name}.svg").write_text(draw(picture, "light"), encoding="utf-8")
        client.log_artifacts(run_id, str(folder))


def fill_stage(client: MlflowClient, run: Run, audit: AuditReport, stage: content.Stage) -> None:
    """A child run: its metrics and one paragraph."""
    numbers = content.metrics(audit)[stage]
    tags = {
        "mlflow.note.content": content.stage_description(audit, stage)[:7900],
        "guardedit.outcome": audit.outcome,
    }
    _batched(client, run.info.run_id, _numbers(numbers, audit), [], tags_of(tags))
    close(client, run, "FINISHED", audit)


def close(client: MlflowClient, run: Run, status: str, audit: AuditReport, name: str | None = None) -> None:
    """Set name, status and end; a plan that waits stays open."""
    if status == "FINISHED":
        client.set_terminated(run.info.run_id, status, content.milliseconds(audit.created))
    else:
        client.update_run(run.info.run_id, status)
    if name is not None and name != run.info.run_name:
        client.update_run(run.info.run_id, name=name)
