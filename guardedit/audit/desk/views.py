"""Saved views of the run list: Pending, Risk × drift, Incidents.

MLflow keeps a view in an experiment tag whose form is not documented (3.17: JSON around a deflated state). It is
written here and nowhere else; a browser that does not understand it shows the plain list.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND = "genai_development"
"""The kind of experiment whose sidebar has the Review tab."""
_PREFIX = "mlflow.sharedViewState."
_MADE = 1_764_547_200_000
"""One moment for all views, so that writing them again changes nothing; milliseconds."""
_COLUMNS = [
    "tags.`guardedit.outcome`", "tags.`guardedit.verdict`", "params.`editor`", "tags.`guardedit.decided_by`",
    "metrics.`preop/leakage_share`", "metrics.`preop/limits_broken`", "metrics.`postop/near_lost_top1`",
    "metrics.`postop/limits_broken`", "tags.`guardedit.plan_digest`",
]  # fmt: skip
_ONLY_PLANS = "tags.`guardedit.stage` = 'plan'"
_CHARTS = (
    ("preop/leakage_share", "postop/far_kl"),
    ("preop/rehearsed_near_lost_top1", "postop/near_lost_top1"),
)
"""What was expected before the write against what the monitor then found."""

VIEWS: dict[str, tuple[str, str, bool]] = {
    "guardedit-pending": ("Pending", f"{_ONLY_PLANS} and tags.`guardedit.waits` = 'yes'", False),
    "guardedit-risk-drift": ("Risk × drift", _ONLY_PLANS, True),
    "guardedit-incidents": ("Incidents", f"{_ONLY_PLANS} and tags.`guardedit.incident` = 'yes'", False),
}
"""Key -> name, filter, whether it is one of charts."""


def address(server: str, experiment: str, key: str) -> str:
    """A view's address in a browser."""
    charts = "&compareRunsMode=CHART" if VIEWS[key][2] else ""
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey={key}{charts}"


def write(client: MlflowClient, experiment: str) -> None:
    """Put the views and the experiment's kind into its tags, those that are not there yet."""
    there = client.get_experiment(experiment).tags
    wanted = {_PREFIX + key: _tag(key) for key in VIEWS} | {"mlflow.experimentKind": KIND}
    for name, value in wanted.items():
        if there.get(name) != value:
            client.set_experiment_tag(experiment, name, value)


def _tag(key: str) -> str:
    name, wanted, charts = VIEWS[key]
    packed = zlib.compress(json.dumps(_state(wanted, charts)).encode(), 9)
    state = "deflate;" + base64.b64encode(packed).decode()
    return json.dumps({"name": name, "createdAt": _MADE, "updatedAt": _MADE, "state": state})


def _state(wanted: str, charts: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        "searchFilter": wanted, "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": _COLUMNS, "columnOrder": [], "columnWidths": {}, "runsHiddenMode": "SHOWALL",
        "viewMaximized": False, "runListHidden": False, "isAccordionReordered": False,
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }  # fmt: skip
    if charts:
        section = "guardedit-risk-drift"
        state["compareRunCharts"] = [_scatter(section, n, x, y) for n, (x, y) in enumerate(_CHARTS)]
        state["compareRunSections"] = [
            {"uuid": section, "name": "Before the write × on the copy", "display": True, "isReordered": False,
             "deleted": False, "isGenerated": False}
        ]  # fmt: skip
    return state


def _scatter(section: str, number: int, x: str, y: str) -> dict[str, Any]:
    return {
        "uuid": f"{section}-{number}", "type": "SCATTER", "runsCountToCompare": 100, "metricSectionId": section,
        "deleted": False, "isGenerated": False, "xaxis": {"key": x, "type": "METRIC"},
        "yaxis": {"key": y, "type": "METRIC"},
    }  # fmt: skip
