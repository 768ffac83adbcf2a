"""What is different between a plan and the one it was made anew from, as text."""

from __future__ import annotations

from typing import Any

from guardedit.cli.words import clean

SHOWN = 8
"""Scores that are shown; all are in the JSON document."""


def difference_text(told: dict[str, Any], n: int = SHOWN) -> str:
    """Verdict first, then why, what moved, and how far the solved change moved."""
    before, after = told["outcome"]["before"], told["outcome"]["after"]
    verdict = "not worse" if told["not_worse"] else "WORSE"
    lines = [f"  made anew from {told['old']} ({told['old_state']}): {before} -> {after}, {verdict}"]
    lines += [f"    since: {clean(reason)}" for reason in told["because"]]
    lines += [f"    waiver left out: {clean(problem)}" for problem in told["waivers_dropped"]]
    lines += [_verdict_line(row) for row in told["verdicts"]]
    lines += _score_lines(told["scores"], n)
    lines.append(f"    {_delta_line(told['delta'])}")
    return "\n".join(lines)


def _verdict_line(row: dict[str, Any]) -> str:
    return f"    {row['before'] or 'new limit'} -> {row['after']} ({row['level']}): {clean(row['sentence'])}"


def _score_lines(rows: list[dict[str, Any]], n: int) -> list[str]:
    if not rows:
        return ["    no score moved by more than 1 %"]
    lines = [
        f"    {row['name']}: {_number(row['before'])} -> {_number(row['after'])} {clean(row['unit'])}".rstrip()
        for row in rows[:n]
    ]
    return lines + ([f"    … and {len(rows) - n} more scores (--json has all)"] if len(rows) > n else [])


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _delta_line(delta: dict[str, Any]) -> str:
    if delta["identical"]:
        return "the solved change is the same"
    if delta["distance"] is None:
        return "the solved change is another; how far apart the two are is not measured"
    cosine = f", cosine {delta['cosine']:.4f}" if delta["cosine"] is not None else ""
    return f"the solved change moved by {delta['distance']:.2%} of its size{cosine}"


def side_by_side(heads: tuple[str, str], texts: tuple[str, str]) -> str:
    """Two texts in two columns as wide as the terminal allows, each under its head."""
    import io

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2))
    for head in heads:
        table.add_column(Text(head), ratio=1, overflow="fold")
    table.add_row(*(Text(clean(text)) for text in texts))
    out = io.StringIO()
    Console(file=out, width=Console().width, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
