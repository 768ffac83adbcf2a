"""Request files: YAML, JSON and JSON lines; what is broken is named with its line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from guardedit.errors import BadRequestError
from guardedit.pipeline.reading import read_requests

GOOD = {"subject": "Eiffel Tower", "prompt": "The {} is in", "target_new": "Rome"}


def entry(number: int, **changes: str) -> str:
    """One YAML list entry of four lines."""
    named = {**GOOD, "subject": f"Tower {number}", **changes}
    lines = [f"{key}: {json.dumps(value)}" for key, value in named.items()]
    return "- " + "\n  ".join(lines) + "\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_json_and_json_lines_give_the_same_requests(tmp_path: Path) -> None:
    rows = [{**GOOD, "subject": name} for name in ("Eiffel Tower", "Big Ben", "Zürich")]
    lines = "\n".join(json.dumps(row) for row in rows)
    files = [
        written(tmp_path / "a.yaml", "".join(entry(0, **row) for row in rows)),
        written(tmp_path / "a.json", json.dumps(rows, indent=2)),
        written(tmp_path / "a.jsonl", f"{lines}\n\n"),
        written(tmp_path / "b.jsonl", "\ufeff" + lines.replace("\n", "\r\n")),
    ]
    found = [read_requests(path) for path in files]
    assert [request.subject for request in found[0]] == [row["subject"] for row in rows]
    assert found[0] == found[1] == found[2] == found[3]


def test_one_mapping_is_one_request(tmp_path: Path) -> None:
    (request,) = read_requests(written(tmp_path / "a.yaml", json.dumps(GOOD)))
    assert request.filled == "The Eiffel Tower is in"


@pytest.mark.parametrize("broken", [9_999])
def test_one_broken_entry_among_ten_thousand_is_named_by_its_line_in_seconds(
    tmp_path: Path, broken: int
) -> None:
    entries = [entry(number) for number in range(10_000)]
    entries[broken] = entry(broken, prompt="no blank")
    start = time.process_time()
    with pytest.raises(BadRequestError, match=rf"request {broken + 1} \(line {3 * broken + 1}\).*0 `{{}}`"):
        read_requests(written(tmp_path / "many.yaml", "".join(entries)))
    assert time.process_time() - start < 30
    rows = [json.dumps({**GOOD, "subject": f"Tower {number}"}) for number in range(10_000)]
    rows[broken] = json.dumps({**GOOD, "subjet": "x"})
    with pytest.raises(BadRequestError, match=rf"\(line {broken + 1}\).*unknown key 'subjet'"):
        read_requests(written(tmp_path / "many.jsonl", "\n".join(rows)))


def test_comments_and_blank_lines_count(tmp_path: Path) -> None:
    text = "# two towers\n\n" + entry(0) + "\n# the second\n" + entry(1, target_new=" ")
    with pytest.raises(BadRequestError, match=r"request 2 \(line 8\): target_new is empty"):
        read_requests(written(tmp_path / "a.yaml", text))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"subject": "x"\n', "line 1 is not JSON"),
        ("a.jsonl", json.dumps(GOOD) + "\n\n[1, 2\n", "line 3 is not JSON"),
        ("a.jsonl", json.dumps(GOOD) + "\n3\n", r"\(line 2\) is int"),
        ("a.jsonl", "\n\n", "holds no request"),
        ("a.yaml", "[]", "holds no request"),
        ("a.yaml", "", "is NoneType"),
        ("a.yaml", "- {subject: [}\n", "cannot be read"),
        ("a.yaml", "- !!python/object:os.system x\n", "cannot be read"),
        ("a.yaml", "- 3\n", r"\(line 1\) is int"),
    ],
)
def test_what_is_no_request_file_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        read_requests(written(tmp_path / name, text))
