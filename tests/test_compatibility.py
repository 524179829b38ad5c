"""What an earlier commit saved, computed and exported: `tests/fixtures/write.py` says which, and how.

ResNet's scales are powers of two, so its sums are exact and its logits equal to the last bit on every processor. ViT's
may differ where another processor adds in another order and a value lies at a tie.

Checkpoints are compared byte for byte. ONNX files are compared by weights, scales and results: later exports name zero
points for each weight, repeat Q/DQ pairs and fold constants, none of which changes a number.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_qat import convert, export_onnx


FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ("resnet", "vit")
KINDS = ("training", "quantized")

#: Entries of config.json that name the versions of the libraries, not the model.
VERSIONS = {"transformers_version", "torch_version", "hf_qat_version"}


def load(name: str, kind: str) -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(FIXTURES / name / kind).eval()


def without_versions(value: object) -> object:
    """A JSON value without the entries of `VERSIONS`, at any depth."""
    if isinstance(value, dict):
        return {key: without_versions(item) for key, item in value.items() if key not in VERSIONS}
    return [without_versions(item) for item in value] if isinstance(value, list) else value


def require_same_checkpoint(written: Path, kept: Path) -> None:
    assert (written / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
    configs = [json.loads((directory / "config.json").read_text(encoding="utf-8")) for directory in (written, kept)]
    assert without_versions(configs[0]) == without_versions(configs[1])


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_kept_logits_tell_images_and_labels_apart(name):
    kept = load_file(FIXTURES / name / "logits.safetensors")
    assert kept["converted"].std(0).max() > 0.4 and kept["converted"].std(1).min() > 0.4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_kept_checkpoint_computes_the_logits_of_the_commit_that_wrote_it(name, kind):
    kept = load_file(FIXTURES / name / "logits.safetensors")
    computed = logits(load(name, kind), kept["pixel_values"])
    wanted = kept["prepared" if kind == "training" else "converted"]
    if name == "resnet":
        assert torch.equal(computed, wanted)
    else:
        assert (computed - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_kept_checkpoint_is_saved_again_as_the_same_bytes(name, kind, tmp_path):
    load(name, kind).save_pretrained(tmp_path)
    require_same_checkpoint(tmp_path, FIXTURES / name / kind)


@pytest.mark.parametrize("name", MODELS)
def test_a_kept_training_checkpoint_converts_to_the_kept_quantized_one(name, tmp_path):
    convert(load(name, "training")).save_pretrained(tmp_path)
    require_same_checkpoint(tmp_path, FIXTURES / name / "quantized")


def signature(graph: onnx.GraphProto) -> list[bytes]:
    return [value.SerializeToString(deterministic=True) for value in (*graph.input, *graph.output)]


def computed_by(file: Path, pixels: Tensor, optimized: bool) -> np.ndarray:
    """Logits of a file with a batch of 1, image by image, on ONNX Runtime."""
    levels, options = onnxruntime.GraphOptimizationLevel, onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"pixel_values": one[None]})[0] for one in pixels.numpy()])


@pytest.mark.parametrize("name", MODELS)
def test_a_kept_quantized_checkpoint_is_exported_again_with_the_same_numbers(name, tmp_path):
    written, kept = tmp_path / "model.onnx", FIXTURES / name / "model.onnx"
    export_onnx(load(name, "quantized"), written)
    new, old = onnx.load(written), onnx.load(kept)
    tensors, wanted = ({one.name: numpy_helper.to_array(one) for one in m.graph.initializer} for m in (new, old))
    read = {node.input[2] for node in old.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    own = {key for key in wanted.keys() - read if "." in key}  # weights, biases, scales
    assert len(own) > 20
    for key in own:
        assert tensors[key].dtype == wanted[key].dtype
        assert tensors[key].tobytes() == wanted[key].tobytes()
    assert signature(new.graph) == signature(old.graph)
    assert list(new.opset_import) == list(old.opset_import) and new.ir_version == old.ir_version
    pixels = load_file(FIXTURES / name / "logits.safetensors")["pixel_values"]
    for optimized in (False, True):
        np.testing.assert_array_equal(computed_by(written, pixels, optimized), computed_by(kept, pixels, optimized))
