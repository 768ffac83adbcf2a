"""The report's pictures: well-formed, every mark inside, no plotting library."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardedit.audit import plots, strokes
from guardedit.audit.sheet import Bars, Intervals, Picture, Table
from guardedit.audit.words import visible


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=30), st.floats(0, 1))
def test_any_label_makes_a_well_formed_picture(label: str, value: float) -> None:
    picture = Picture("p", label, label, Bars(((visible(label), value),), "share"), Table("t", ("a",), ()))
    shown = plots.draw(picture.__class__("p", visible(label), visible(label), picture.data, picture.table))
    assert visible(label) in "".join(ElementTree.fromstring(shown).itertext())


def test_drawing_needs_no_plotting_library() -> None:
    code = (
        "import sys, guardedit.audit.plots as p; from guardedit.audit.sheet import *; "
        "p.draw(Picture('a', 't', 'd', Bars((('x', 0.5),), 'share'), Table('t', ('a',), ()))); "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (-0.3, 0.31, [-0.2, 0, 0.2]), (5, 5, [5])],
)
def test_a_scale_has_round_marks(low: float, high: float, expected: list[float]) -> None:
    assert strokes.ticks(low, high) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(1e-12, 1e6), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_every_place_of_a_picture_is_a_number_in_it(rows: list[tuple[float, float, float]]) -> None:
    data = Intervals(tuple(("x", v, v * (1 - a), v * (1 + b)) for v, a, b in rows), "nats")
    root = ElementTree.fromstring(plots.draw(Picture("p", "t", "d", data, Table("t", ("a",), ()))))
    height = float(root.attrib["viewBox"].split()[3])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert -1 <= float(text.attrib["x"]) <= 901 and 0 <= float(text.attrib["y"]) <= height
