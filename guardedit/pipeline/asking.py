"""Requests as they were meant: what the model says today is asked of it where a request does not name it."""

from __future__ import annotations

from collections.abc import Sequence

from guardedit.drift.probes import top_answer
from guardedit.editors import EDITORS
from guardedit.edits.batches import require_consistent
from guardedit.edits.context_texts import asked_openings, behind, kinds
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.kit import require_editor
from guardedit.pipeline.recovery import editing
from guardedit.pipeline.trying import continued
from guardedit.pipeline.workspace import Workspace
from guardedit.records import EditRequest


def understood(
    workspace: Workspace, requests: Sequence[EditRequest], editor: str, each: bool = False
) -> tuple[tuple[EditRequest, ...], ...]:
    """The requests, completed, in groups of which each is to be one plan: all together where the editor is joint and
    `each` is not asked for, else one by one. Whatever is wrong with one is found before anything is solved for another.

    Raises BadRequestError for an unknown editor, or a request that asks for what the model says already.
    """
    require_editor(editor)
    workspace.kit.settings(editor)
    together = EDITORS[editor].joint and not each
    if together:
        require_plannable(editor, requests)
    settle_first(workspace)
    completed = tuple(complete(workspace.handle, request) for request in requests)
    return (completed,) if together else tuple((one,) for one in completed)


def complete(handle: ModelHandle, request: EditRequest) -> EditRequest:
    """The request with what the model says today as `target_true`, where it names none.

    Raises BadRequestError where the model says the new target already.
    """
    request = _in_its_context(request)
    if request.target_true is not None:
        return request
    answer, wanted = top_answer(handle, request.filled), request.target_new.strip()
    # A token can begin many words: the whole target is compared.
    if wanted.startswith(answer) and _says(handle, request.filled, wanted):
        raise BadRequestError(
            f"the model already answers {wanted!r} to {request.filled!r}; name target_true if you mean to strengthen it"
        )
    return request.model_copy(update={"target_true": answer})


def _in_its_context(request: EditRequest) -> EditRequest:
    """A request with a context of a shipped kind, with prompts in it where it names none."""
    if request.context not in kinds() or request.in_context:
        return request
    prompts = tuple(behind(before, request.filled) for before in asked_openings(str(request.context)))
    return request.model_copy(update={"in_context": prompts})


def settle_first(workspace: Workspace) -> None:
    """Plan on what is live: put right what a crash left, and take over what another process committed."""
    if workspace.store.exists:
        with editing(workspace):
            pass


def _says(handle: ModelHandle, prompt: str, answer: str) -> bool:
    """Whether the model's greedy continuation begins with the whole answer."""
    length = int(handle.encode([f" {answer}"])["attention_mask"].sum())
    return continued(handle, prompt, length + 1).strip().startswith(answer)


def require_plannable(editor: str, requests: Sequence[EditRequest]) -> None:
    """Raise BadRequestError unless one plan by this editor can hold these requests.

    Not for an unknown editor, no requests, many where it takes one at a time, and two that repeat or contradict each
    other.
    """
    require_editor(editor)
    if not requests:
        raise BadRequestError("there is no request to plan")
    if len(requests) > 1 and not EDITORS[editor].joint:
        joint = ", ".join(sorted(name for name, one in EDITORS.items() if one.joint))
        raise BadRequestError(
            f"{editor} edits one fact at a time, got {len(requests)}; plan them one by one (`--each`), or together "
            f"with one of {joint}"
        )
    for request in requests:
        _require_same_scope(editor, request)
    require_consistent(requests)


def _require_same_scope(editor: str, request: EditRequest) -> None:
    """Raise BadRequestError where a fact of one context would be changed everywhere, or the reverse."""
    if (request.context is not None) == EDITORS[editor].in_context:
        return
    able = ", ".join(sorted(name for name, one in EDITORS.items() if one.in_context))
    if request.context is None:
        raise BadRequestError(
            f"{editor} keeps a fact to a context, and the request about {request.subject!r} names none; name one, or "
            "take another editor to change the fact everywhere"
        )
    raise BadRequestError(
        f"{editor} would change the fact about {request.subject!r} everywhere, and the request keeps it to the context "
        f"{request.context!r}; plan it with --editor {able or 'contextual'}, or leave the context out"
    )
