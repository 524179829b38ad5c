"""`report.html`: what is in it, and how it lies in a real browser."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from hf_qat.config.qat_config import QATConfig
from hf_qat.export.report import Agreement, ExportReport
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.figure import COLOURS, draw_histograms
from hf_qat.model.analysis.histogram import BINS, Histogram
from hf_qat.model.analysis.layer import Finding, LayerAnalysis
from hf_qat.model.in_float import FloatOperation
from hf_qat.publish.directory import Contents
from hf_qat.publish.figures import DARK, GREY, LIGHT, figures
from hf_qat.publish.html_report import FIGURES, Results, figures_directory, save_report
from hf_qat.publish.runtime_cost import RuntimeCost
from hf_qat.tidl.report import TidlReport
from tests.publish.chromium import CHROMIUM, measured, screenshot


LAYERS = 60
STEPS = list(range(5, 105, 5))


def layer(number: int) -> LayerAnalysis:
    counts = tuple(int(1e4 * math.exp(-(((k - BINS / 2) / 9) ** 2))) for k in range(BINS))
    return LayerAnalysis(
        f"mobilenet_v2.layer.{number}.conv_3x3.convolution", "conv2d", 20.0 + number % 17, 40.0, 30.0, 8, 8,
        -1.0, 2.0, 1.9, -1.0, 2.0, 0.001, 8, 0, 20.0 + number % 7, 25.0,
        (Finding(number % 2, "the weight keeps 19 dB at 4 bits", "give it more bits"),) if number % 10 == 0 else (),
        Histogram(counts, -160.0, 160.0, -127.0, 127.0, 255), Histogram(counts, -1.5, 2.5, -1.0, 2.0, 16),
    )  # fmt: skip


def results(folder: Path) -> Results:
    (folder / "export").mkdir()
    (folder / "export" / "model.onnx").write_bytes(b"0" * 1_500_000)
    agreement = Agreement(1.0, 0, 0.0, 0.0)
    log = [
        {"step": step, "loss": 3 / step, "qat_oscillating_weights": 1 / step, "qat_clipped_weights": 0.01}
        for step in STEPS
    ]
    log += [
        {"step": step, "eval_loss": 4 / step, "eval_accuracy": 1 - 1 / step, "eval_runtime": 1.0} for step in (50, 100)
    ]
    return Results(
        name="my/float<model>",
        config=QATConfig("AM68A", freeze_bn_at=0.5),
        accuracy={
            "float, before quantization": {"loss": 0.05, "accuracy": 0.98333333},
            "quantized by calibration alone": {"loss": 0.07, "accuracy": 0.5},
            "`onnx/model.onnx` on ONNX Runtime": {"accuracy": 0.9666667},
        },
        analysis=Analysis(
            tuple(map(layer, range(LAYERS))), 12.3, (FloatOperation("head", "where", "no rule for it"),), "dB"
        ),
        directory=folder / "export",
        contents=Contents(
            ExportReport(folder / "export" / "model.onnx", 1_500_000, 17, 13, samples=8, plain=agreement),
            TidlReport(folder / "export" / "model.onnx", "AM68A", "J721S2"),
            "",
            True,
            True,
        ),
        log_history=log,
        batch_norm_frozen_at=0.5,
        cost=RuntimeCost(6_000_000, 1_500_000, 8.0, 2.5),
        range_steps=STEPS,
        ranges={f"backbone.layer.{k}.activation_quantizer": [1 + k * step / 100 for step in STEPS] for k in range(9)},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return save_report(results(folder), folder / "report.html")


class Tables(HTMLParser):
    """The cells of each table, and the text of each `pre`, by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.drawings: list[str] = []
        self._ids: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        if tag in ("table", "pre"):
            self._ids.append(name)
            self.tables.setdefault(name, [])
        elif tag == "tr":
            self.tables[self._ids[-1]].append([])
        elif tag == "div" and name:
            self.drawings.append(name)
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag in ("td", "th") and data.strip():
            self.tables[self._ids[-1]][-1].append(data)
        elif self._tag == "pre":
            self.texts[self._ids[-1]] = self.texts.get(self._ids[-1], "") + data


def test_the_page_has_every_part_and_its_figures(page: Path):
    text = page.read_text(encoding="utf-8")
    found = Tables(text)
    assert found.tables["accuracy"][1:] == [
        ["float, before quantization", "0.9833", "0.05"],
        ["quantized by calibration alone", "0.5", "0.07"],
        ["onnx/model.onnx on ONNX Runtime", "0.9667", "-"],
    ]
    assert len(found.tables["layers"]) == LAYERS + 1
    assert found.tables["files"][1] == ["model.onnx", "1.500"]
    assert found.drawings == ["cost-figure", "training", "quantizers", "histograms", "figure"]
    assert found.tables["cost"][1:] == [
        ["float", "6", "8"],
        ["quantized", "1.5", "2.5"],
        ["quantized / float", "0.25", "0.31"],
    ]
    assert "The chip has times of its own" in text
    assert "target: AM68A" in found.texts["recipe"] and "opset 17" in found.texts["onnx"]
    assert "TIDL takes it" in found.texts["tidl"]
    assert str(page.parent) not in text
    assert "my/float&lt;model&gt;" in text and "<model>" not in text


def test_it_needs_no_network_and_is_small(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and not re.search(r'(src|href)="(?!#)', text)
    assert page.stat().st_size < 3_000_000


def test_every_figure_is_a_picture_for_papers_too(page: Path):
    """300 dots an inch, so that 8 inches, or 10, are printed sharply."""
    pictures = sorted(figures_directory(page).iterdir())
    assert [picture.name for picture in pictures] == sorted(f"{name}.png" for name in FIGURES)
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width in (2400, 3000) and len(image.convert("L").getcolors(256)) > 5


@pytest.mark.slow
def test_without_training_there_is_no_training_part(tmp_path: Path):
    from dataclasses import replace

    whole = results(tmp_path)
    page = save_report(whole, tmp_path / "report.html")
    text = save_report(replace(whole, log_history=(), ranges={}, contents=None, cost=None), page).read_text("utf-8")
    assert 'id="training"' not in text and 'id="quantizers"' not in text and 'id="layers"' in text
    assert 'id="cost"' not in text
    left = {picture.stem for picture in figures_directory(page).iterdir()}
    assert left == {"accuracy", "histograms", "layers"}  # none of the report before


def test_titles_of_histograms_have_two_lines():
    figure = draw_histograms([layer(0)])
    assert [panel.get_title("left") for panel in figure.axes] == [
        "mobilenet_v2.layer.0.conv_3x3.convolution\nweights, in steps of the codes",
        "mobilenet_v2.layer.0.conv_3x3.convolution\nresults, before they are rounded",
    ]


@pytest.mark.parametrize("value", [98.33333333, 0.98333, 0.5, 1.0, 2.9e-05])
def test_metrics_have_four_digits_and_no_zeros_at_their_end(value):
    text = figures(value)
    assert float(text) == pytest.approx(value, rel=5e-4) and len(text) <= 7
    assert not text.endswith(".0")


@pytest.mark.parametrize("colours", [COLOURS.values(), [DARK, LIGHT, GREY]], ids=["layers", "training"])
def test_colours_are_told_apart_in_greyscale(colours):
    """By luma, as a printer has it: Rec. 601."""
    grey = sorted(float(np.dot(to_rgb(colour), [0.299, 0.587, 0.114])) for colour in colours)
    assert min(b - a for a, b in itertools.pairwise([*grey, 1.0])) > 0.1


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes share more than a pixel either way."""
    return all(min(one[k + 2], other[k + 2]) - max(one[k], other[k]) > 1 for k in (0, 1))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1280, 375], ids=["desktop", "phone"])
class TestInABrowser:
    def test_nothing_overlaps_and_nothing_is_cut_off(self, width, page, tmp_path):
        found = measured(page, width, tmp_path)
        assert found["width"] <= width
        for above, below in itertools.pairwise(found["blocks"]):
            assert above[3] <= below[1] + 1
        assert len(found["drawings"]) == 6
        for drawing in found["drawings"]:
            assert len(drawing["texts"]) > 4
            for one, other in itertools.combinations(drawing["texts"], 2):
                assert not overlap(one, other), (one, other)
            left, top, right, bottom = drawing["box"]
            for text in drawing["texts"]:
                assert text[0] >= left - 1 and text[1] >= top - 1 and text[2] <= right + 1 and text[3] <= bottom + 1
                assert text[3] - text[1] >= 4  # pixels high

    def test_one_sees_dark_writing_and_drawings_on_white(self, width, page, tmp_path):
        seen = np.asarray(screenshot(page, width, tmp_path))
        assert seen.shape == (3000, width)
        assert np.median(seen) == 255 and seen.min() < 60
        assert len(np.unique(seen[:, : width // 2])) > 30  # letters and several shades, not a blank page
