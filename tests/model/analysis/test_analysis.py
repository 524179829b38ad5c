from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hf_qat.errors import AnalysisError
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.findings import find
from hf_qat.model.analysis.layer import Finding, LayerAnalysis
from hf_qat.model.in_float import FloatOperation


QUIET = LayerAnalysis("stem", "conv2d", 41.25, 44.0, 43.0, 8, 8, -1.0, 2.0, 1.9, -1.0, 2.0, 0.001, 8, 0, 0.93, 0.91)
NOISY = LayerAnalysis(
    "body<1>", "add", 12.0, 14.5, None, None, 4, -3.0, 3.0, 2.5, -3.0, 3.0, 0.02, 0, 0, 0.4, 0.9,
    (Finding(0, "rounding its result to 4 bits leaves 14 dB", "give it more bits"),),
)  # fmt: skip
LOST = LayerAnalysis("tail", "linear", float("inf"), findings=(Finding(1, "a dead one", "prune it"),))
FOUND = Analysis((QUIET, NOISY, LOST), 12.3, (FloatOperation("head", "where", "no rule for it"),), "accuracy")


def test_the_table_has_a_line_for_each_layer_with_aligned_columns():
    lines = FOUND.table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["stem", "conv2d", "8/8", "41.2", "43.0", "44.0", "0.93", "0.91", "0.10%", "0/8"]
    assert lines[4].split()[:4] == ["tail", "linear", "-/-", "exact"]


def test_the_worst_have_the_severest_findings_and_then_the_most_noise():
    assert [layer.path for layer in FOUND.worst(3)] == ["body<1>", "tail", "stem"]
    assert [layer.path for layer in FOUND.worst(1)] == ["body<1>"]


def test_it_reads_as_text_with_remedies_and_what_stays_in_float():
    text = str(FOUND)
    assert "body<1>: rounding its result to 4 bits leaves 14 dB.\n    give it more bits." in text
    assert "Outputs: 12.3 dB" in text and "In float, no rule for it: where" in text


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_figure_is_written_in_the_format_of_its_name(tmp_path, ending):
    path = FOUND.plot(tmp_path / f"figure.{ending}")
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    if ending == "png":
        with Image.open(path) as image:
            assert image.width == 1500


def test_an_unknown_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(AnalysisError, match="its ending must be one of"):
        FOUND.plot(tmp_path / "figure.txt")
    assert list(tmp_path.iterdir()) == []


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_no_network_and_escapes_names(tmp_path: Path):
    text = FOUND.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert page.tags.count("tr") == 4 and "svg" in page.tags and "script" not in page.tags
    assert [link for link in page.links if not link.startswith("data:")] == []
    assert "body<1>" in page.text and "<1>" not in re.sub(r"&lt;1&gt;", "", text)
    assert len(text) < 3_000_000


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (LayerAnalysis("a", "conv2d", 30.0, 40.0, 19.0, 4, 8, bulk=1.0, lower=-1.0, upper=1.0), "keeps 19 dB at 4"),
        (LayerAnalysis("a", "add", 30.0, 19.0, None, None, 8, bulk=1.0, lower=-1.0, upper=1.0), "leaves 19 dB"),
        (LayerAnalysis("a", "add", 30.0, 25.0, None, None, 8, bulk=1.0, lower=-9.0, upper=8.0), "9 times as far"),
        (
            LayerAnalysis("a", "add", 30.0, 25.0, None, None, 8, bulk=9.0, lower=-1.0, upper=2.0, saturated=0.5),
            "50.0% of its values lie beyond its range, -1 to 2",
        ),
        (LayerAnalysis("a", "conv2d", 30.0, channels=8, dead_channels=2), "2 of 8 channels are constant"),
    ],
)
def test_each_kind_of_fault_is_one_finding(layer, word):
    (finding,) = find(layer)
    assert word in finding.what and finding.remedy


def test_a_layer_with_good_figures_has_none():
    assert find(QUIET) == ()


def test_a_name_that_looks_like_html_or_like_a_formula_is_drawn_and_written_as_it_is(tmp_path: Path):
    name = "$\\frac{$(rm -rf ~)--><script>alert('x')</script>\x1b"
    layer = replace(NOISY, path=name)
    found = Analysis((QUIET, layer), 12.3, (FloatOperation(name, "where", name),), name)
    text = found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert "script" not in page.tags and "<script" not in text and "</script" not in text
    assert name in page.text
