"""Limits of the whole file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hf_qat import check_tidl
from tests.tidl.layers import findings, from_text, one_layer
from tests.tidl.planted import IMAGE, qdq


@pytest.mark.parametrize(
    ("opset", "verdict"), [(17, None), (18, None), (19, None), (20, "warning"), (21, "warning"), (22, "refused")]
)
def test_opsets_are_those_of_tis_tools(opset, verdict, saved):
    report = check_tidl(saved(one_layer("Relu", IMAGE, opset=opset)), "AM68A")
    assert {issue.verdict for issue in report.issues if issue.rule == "opset"} == ({verdict} if verdict else set())


@pytest.mark.parametrize(
    ("shape", "shown"),
    [([1, 8, 16, 16], None), (["N", 8, 16, 16], "['N', 8, 16, 16]"), ([1, 8, "H", "W"], "[1, 8, 'H', 'W']")],
)
def test_every_size_of_an_input_is_a_number(shape, shown, saved):
    found = findings(saved(one_layer("Relu", shape)))
    wanted = {} if shown is None else {"dynamic-shape": f"refused: input x has the shape {shown}"}
    assert {rule: why for rule, why in found.items() if rule == "dynamic-shape"} == wanted


def test_the_first_of_the_values_without_a_shape_is_named(saved):
    model = from_text("g (float[1, 8] x) => (float[1, 8] z) { a = Relu(x) b = Relu(a) c = Relu(b) z = Relu(c) }")
    assert findings(saved(model)) == {}
    kept = [info for info in model.graph.value_info if info.name != "b"]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    assert findings(saved(model)) == {
        "shape-inference": "refused: 1 of 4 values have no shape, b the first",
    }


def test_a_shape_that_depends_on_the_data_names_its_layer(saved):
    model = from_text("g (float[8] x) => (int64[1, n] z) { a = NonZero(x) z = Identity(a) }")
    issue = next(issue for issue in check_tidl(saved(model), "AM68A").issues if issue.rule == "shape-inference")
    assert "the shape of a depends on the data" in issue.remedy


@pytest.mark.parametrize(("images", "said"), [(1, {}), (2, {"batch": "warning: input x takes 2 images at once"})])
def test_one_image_at_a_time(images, said, saved):
    assert findings(saved(one_layer("Relu", [images, 8, 16, 16]))) == said


def test_operators_of_onnx_runtime_are_known_and_others_are_not(saved):
    text = "g (float[1, 8] x) => (float[1, 8] z) { y = DOMAIN.Gelu(x) z = Relu(y) }"
    theirs = from_text(text.replace("DOMAIN", "com.microsoft"), imports=', "com.microsoft" : 1')
    other = from_text(text.replace("DOMAIN", "ai.somebody"), imports=', "ai.somebody" : 1')
    assert "domain" not in findings(saved(theirs))
    assert findings(saved(other))["domain"].startswith("refused: Gelu is of the domain ai.somebody")


def test_a_file_with_quantizers_or_ranges_is_not_float(saved):
    def is_float(model: onnx.ModelProto) -> bool:
        return "no-quantizers" in {issue.rule for issue in check_tidl(saved(model), "AM68A").issues}

    relu6 = one_layer("Clip", IMAGE, np.float32(0), np.float32(6))
    assert is_float(relu6) and not is_float(qdq())
    relu6.graph.node[0].name = "stem/Range"
    assert not is_float(relu6)
    assert numpy_helper.to_array(relu6.graph.initializer[1]) == 6
