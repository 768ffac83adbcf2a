"""A page as an MLflow trace: telling it again changes nothing, and it is read back to see what stood there."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from guardedit.audit.desk.page import Page

if TYPE_CHECKING:
    from mlflow.entities import Span, TraceInfo
    from mlflow.tracing.client import TracingClient


def tell(
    client: TracingClient, experiment: str, page: Page, at: int, tags: dict[str, str], run_id: str
) -> None:
    """Write the page's trace, or bring an old one up to date. `at`: milliseconds.

    The Review tab shows a trace's previews, not the trace. SQLite keeps a preview of any length; a database that
    refuses the whole page gets the brief one.
    """
    from mlflow.exceptions import MlflowException

    client.log_spans(experiment, [_span(page, at)])
    try:
        client.start_trace(_info(experiment, page, at, tags, run_id, (page.asked, page.found)))
    except MlflowException:
        brief = page.asked_briefly, page.found_briefly
        client.start_trace(_info(experiment, page, at, tags, run_id, brief))


def _info(
    experiment: str, page: Page, at: int, tags: dict[str, str], run_id: str, previews: tuple[str, str]
) -> TraceInfo:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    return TraceInfo(
        trace_id=page.trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=at,
        state=TraceState.OK,
        request_preview=previews[0],
        response_preview=previews[1],
        execution_duration=0,
        trace_metadata={"mlflow.sourceRun": run_id, "mlflow.trace_schema.version": "3"},
        tags={"mlflow.traceName": page.title, **tags},
    )


def is_shown(client: TracingClient, page: Page) -> bool:
    """Whether the server shows this page now: both what the Review tab prints and the whole trace."""
    info = client.get_trace_info(page.trace_id)
    previews = info.request_preview, info.response_preview
    told = ((page.asked, page.found), (page.asked_briefly, page.found_briefly))
    spans = client.get_trace(page.trace_id).data.spans
    first = next((span for span in spans if span.parent_id is None), None)
    whole = first is not None and (first.inputs, first.outputs) == (page.inputs, page.outputs)
    return previews in told and whole and len(spans) == 1


def _span(page: Page, at: int) -> Span:
    from mlflow.entities import Span

    number = int(page.trace_id.removeprefix("tr-"), 16)
    moment = at * 1_000_000
    return Span.from_dict(
        {
            "trace_id": _base64(number, 16),
            "span_id": _base64(number >> 64, 8),
            "parent_span_id": "",
            "name": "edit",
            "start_time_unix_nano": moment,
            "end_time_unix_nano": moment,
            "status": {"code": "STATUS_CODE_OK", "message": ""},
            "attributes": {
                "mlflow.traceRequestId": json.dumps(page.trace_id),
                "mlflow.spanType": json.dumps("CHAT_MODEL"),
                "mlflow.spanInputs": json.dumps(page.inputs, ensure_ascii=False),
                "mlflow.spanOutputs": json.dumps(page.outputs, ensure_ascii=False),
            },
            "events": [],
        }
    )


def _base64(number: int, length: int) -> str:
    return base64.b64encode(number.to_bytes(length, "big")).decode()
