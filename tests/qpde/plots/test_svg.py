"""Figures inside of a page."""

import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from qpde.plots import along_depth_figure, bound_figure, inline_svg, maps_figure
from qpde.plots.svg import VARIABLES

CURVES = {"symmetric": [1.0, 2.0, 3.0], "a<b & $c$": [2.0, 1.0, 4.0]}


def test_text_is_text_and_colours_are_variables():
    text = inline_svg(
        along_depth_figure(CURVES, heading="Error", unit="rms", among=("plain", *CURVES)),
        name="error",
        label='a "b" <c>',
    )
    root = ElementTree.fromstring(text)
    assert root.tag == "svg"
    assert root.get("aria-label") == 'a "b" <c>'
    assert root.get("width") is None, "a page says how wide it is"
    written = {element.text for element in root.iter("text")}
    assert {"Error", "rms", "block"} <= written
    assert any("a<b & $c$" in text for text in written)
    used = {variable for colour, variable in VARIABLES.items() if f"var({variable}, {colour.lower()})" in text}
    assert used == {"--ink", "--quiet", "--grid", "--page", "--curve0", "--curve2"}
    assert not re.search(r"(?:fill|stroke): ?(?:#|rgb|white|black)", text)
    assert "font-family" not in text
    assert "<style" not in text


def test_ids_begin_with_the_name_and_every_reference_is_answered():
    texts = [inline_svg(along_depth_figure(CURVES, heading="", unit=""), name=name, label="x") for name in "ab"]
    ids = [[e.get("id") for e in ElementTree.fromstring(text).iter() if e.get("id")] for text in texts]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for text, own in zip(texts, ids, strict=True):
        used = {e.get("href")[1:] for e in ElementTree.fromstring(text).iter("use")}
        assert used <= set(own)
        assert len(own) == len(set(own))


class References(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for key, value in attributes if key in ("href", "src")]


def test_clouds_and_maps_are_pictures_inside():
    for figure in (bound_figure({"a": ([0.1], [0.5])}, heading=""), maps_figure({"a": [np.eye(2)]}, ["b"])):
        found = References(inline_svg(figure, name="a", label="x")).found
        assert any(reference.startswith("data:image/png;base64,") for reference in found)
        assert all(reference.startswith(("#", "data:")) for reference in found)


def test_global_state_of_matplotlib_stays_as_it_is():
    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    inline_svg(along_depth_figure(CURVES, heading="", unit=""), name="a", label="x")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


@pytest.mark.parametrize("name", ["", "1a", 'a"b', "a b", "ä"])
def test_names_that_are_no_ids_are_refused(name):
    with pytest.raises(ValueError, match="begins with a letter"):
        inline_svg(along_depth_figure(CURVES, heading="", unit=""), name=name, label="x")
