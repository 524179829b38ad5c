"""Bundles of every device × model: complete, checked, and what the ONNX file holds by `onnx` alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import BatchFeature, SegformerImageProcessorPil, ViTImageProcessorPil

from hf_qat import QATConfig, calibrate, convert, export_tidl, prepare_qat
from hf_qat.errors import CalibrationError, CaptureError, ConfigError, ExportError, StageError
from hf_qat.tidl.config_yaml import dataset
from tests.models import HUGGING_FACE, LABELS, hand_written
from tests.tidl.cases import DEVICES, FRAMES, NAMES, ON_DEVICES, TRANSFORMERS, scenes


FILES = {
    "README.md",
    "SHA256SUMS",
    "calibration",
    "check.json",
    "compile.py",
    "config.yaml",
    "dataset.yaml",
    "infer.py",
    "model",
    "runtime_options.json",
}

#: The keys of edgeai-benchmark's param_template_config.yaml, and the arguments of its `get_transform_base`.
KEYS = {
    "": "task_type calibration_dataset input_dataset preprocess session postprocess metric model_info",
    "preprocess": "resize crop data_layout reverse_channels backend interpolation add_flip_image resize_with_pad "
    "pad_color",
    "session": "session_name target_device input_optimization input_data_layout input_mean input_scale "
    "runtime_options model_path model_id input_details output_details num_inputs",
    "model_info": "metric_reference model_shortlist compact_name shortlisted",
}


#: Class names of a config that somebody else wrote.
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b ` $(touch made) ; 'x' \"y\"",
    "key: [1, *anchor]\n- !!python/object/apply:os.system ['touch made']",
    "\x1b]0;title\x07",
    "${HOME} $name",
]


def tensors_of(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize(("name", "device"), ON_DEVICES)
def test_every_bundle_is_complete_accepted_and_in_the_documented_schema(name, device, bundled):
    directory = bundled(name, device)

    assert {path.name for path in directory.iterdir()} == FILES
    check = json.loads((directory / "check.json").read_text())
    assert check["ok"] and check["target"] == device
    assert not {issue["rule"] for issue in check["issues"]} & {"matmul-mixed-signs", "no-range", "no-quantizers"}
    assert check["accelerated_macs"] == check["macs"] > 0 and check["subgraphs"] == 1
    assert {layer["runs_on"] for layer in check["layers"]} == {"accelerator"}
    assert check["onnxruntime"]["frames"] == FRAMES
    config = yaml.safe_load((directory / "config.yaml").read_text())
    for section, keys in KEYS.items():
        assert set(config[section] if section else config) == set(keys.split())
    options = config["session"]["runtime_options"]
    assert options["advanced_options:quantization_scale_type"] == (1 if device == "TDA4VM" else 4)
    assert options["info"] == {"prequantized_model_type": 1}
    assert "onnxruntime:graph_optimization_level" not in options  # YAML cannot hold what ONNX Runtime takes
    settings = json.loads((directory / "runtime_options.json").read_text())
    assert settings["disable_optimizations"] == (name in TRANSFORMERS)
    assert (directory / config["session"]["model_path"]).is_file()
    assert config["task_type"] == ("segmentation" if name == "segformer" else "classification")
    categories = yaml.safe_load((directory / "dataset.yaml").read_text())["categories"]
    assert [category["id"] for category in categories] == list(range(LABELS))


@pytest.mark.parametrize(("name", "device"), ON_DEVICES)
def test_the_file_gives_the_trained_models_top_1_on_all_frames(name, device, bundled, converted):
    path = bundled(name, device) / "model" / f"{name}.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    frames = sorted((path.parent.parent / "calibration").iterdir())
    assert len(frames) == FRAMES
    logits = []
    for pixels, frame in zip(scenes(name, FRAMES + 3, seed=1)[0], frames, strict=False):
        np.testing.assert_array_equal(np.load(frame)["pixel_values"][0], pixels)
        got = session.run(None, {"pixel_values": pixels[None].numpy()})[0]
        with torch.no_grad():
            wanted = converted(name, device)(pixel_values=pixels[None]).logits.numpy()
        np.testing.assert_array_equal(got.argmax(1), wanted.argmax(1))  # of every pixel, where it has one
        logits.append(wanted)
    assert (np.ptp(logits, axis=0) > 0).any()  # a model that always says the same would agree with anything


@pytest.mark.parametrize("name", NAMES)
def test_files_for_tda4vm_have_power_of_two_scales_no_zero_points_and_one_scale_a_tensor(name, bundled):
    graph = onnx.load(bundled(name, "TDA4VM") / "model" / f"{name}.onnx").graph
    tensors = tensors_of(graph)
    quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) > 20
    for node in quantizers:
        scale, zero = tensors[node.input[1]], tensors[node.input[2]]
        assert scale.size == 1 and zero.size == 1 and zero == 0
        assert np.frexp(scale)[0] == 0.5
        assert zero.dtype in (np.int8, np.uint8, np.int32)


@pytest.mark.parametrize("name", ["vit", "deit", pytest.param("segformer", marks=pytest.mark.slow)])
def test_files_for_tda4vm_multiply_no_signed_by_unsigned_activations(name, bundled):
    graph = onnx.load(bundled(name, "TDA4VM") / "model" / f"{name}.onnx").graph
    tensors, makers = tensors_of(graph), {output: node for node in graph.node for output in node.output}

    def quantizer(value: str) -> onnx.NodeProto:
        while makers[value].op_type in ("Transpose", "Reshape"):
            value = makers[value].input[0]
        return makers[value]

    pairs = [[quantizer(value) for value in node.input] for node in graph.node if node.op_type == "MatMul"]
    products = [pair for pair in pairs if not any(node.input[0] in tensors for node in pair)]  # of no weights
    assert len(products) >= 2
    for pair in products:
        assert [node.op_type for node in pair] == ["DequantizeLinear"] * 2
        assert {tensors[node.input[2]].dtype for node in pair} == {np.dtype(np.int8)}


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("name", NAMES)
def test_files_for_the_other_devices_have_one_scale_per_output_channel(name, device, bundled):
    graph = onnx.load(bundled(name, device) / "model" / f"{name}.onnx").graph
    tensors, makers = tensors_of(graph), {output: node for node in graph.node for output in node.output}
    layers = 0
    for node in graph.node:
        weights = makers[node.input[1]] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if weights is None or weights.input[0] not in tensors:
            continue  # a product of two activations
        layers += 1
        scale, codes = tensors[weights.input[1]], tensors[weights.input[0]]
        assert scale.shape == (codes.shape[-1 if node.op_type == "MatMul" else 0],) and codes.dtype == np.int8
        assert not tensors[weights.input[2]].any()
    assert layers > 5
    activations = [tensors[node.input[1]].size for node in graph.node if node.op_type == "QuantizeLinear"]
    assert set(activations) == {1}


def test_the_model_is_static_of_opset_17_and_every_value_has_a_shape(bundled):
    model = onnx.load(bundled("vit", "AM68A") / "model" / "vit.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
    for name in {name for node in model.graph.node for name in node.output}:
        assert all(dim.dim_value > 0 for dim in known[name].type.tensor_type.shape.dim)
    assert {node.op_type for node in model.graph.node} & {"Expand", "Identity", "Shape"} == set()


def test_sums_are_those_of_sha256sum_and_cover_every_file(bundled):
    directory = bundled("resnet", "AM68A")
    lines = dict(line.split("  ")[::-1] for line in (directory / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert files - {"SHA256SUMS"} == set(lines)
    for name, digest in lines.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest


def test_no_bundle_claims_to_be_compiled(bundled):
    names = {path.name for path in bundled("resnet", "TDA4VM").rglob("*")}
    assert "param.yaml" not in names and not [name for name in names if name.endswith(".bin")]
    readme = (bundled("resnet", "TDA4VM") / "README.md").read_text()
    assert "Not verified on a board" in readme and "SOC=am68pa" in readme and "$" not in readme.replace("$target", "")


class TestClip:
    """The older form for TDA4VM."""

    def test_ranges_are_in_clips_and_weights_lie_on_their_grid(self, bundled):
        before = onnx.load(bundled("resnet", "TDA4VM") / "model" / "resnet.onnx").graph
        after = onnx.load(bundled("resnet", "TDA4VM", "clip") / "model" / "resnet.onnx").graph
        assert not [node for node in after.node if "Quantize" in node.op_type or "Dequantize" in node.op_type]
        clips = [node for node in after.node if node.op_type == "Clip"]
        quantize = [node for node in before.node if node.op_type == "QuantizeLinear"]
        old, new = tensors_of(before), tensors_of(after)
        assert len(clips) == len(quantize)
        for clip, node in zip(clips, quantize, strict=True):
            limits = np.iinfo(old[node.input[2]].dtype)
            assert new[clip.input[1]] == limits.min * old[node.input[1]]
            assert new[clip.input[2]] == limits.max * old[node.input[1]]
        for node in before.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in old:
                codes, scale = old[node.input[0]].astype(np.float64), old[node.input[1]].astype(np.float64)
                np.testing.assert_array_equal(new[node.output[0]], (codes * scale).astype(np.float32))

    def test_it_computes_the_same_but_for_rounding_and_tidl_is_told_so(self, bundled):
        check = json.loads((bundled("resnet", "TDA4VM", "clip") / "check.json").read_text())
        assert check["ok"] and "no-quantizers" not in {issue["rule"] for issue in check["issues"]}
        assert check["onnxruntime"]["max_abs_diff"] < 0.5
        settings = json.loads((bundled("resnet", "TDA4VM", "clip") / "runtime_options.json").read_text())
        assert "advanced_options:prequantized_model" not in settings["compile"]
        assert settings["compile"]["advanced_options:quantization_scale_type"] == 1

    def test_other_devices_do_not_have_it(self, converted, tmp_path):
        batch = [HUGGING_FACE["resnet"].pixels(2)]
        with pytest.raises(ConfigError, match="ranges='clip' for AM68A"):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", batch, ranges="clip")


class TestRefusals:
    """Nothing is left behind."""

    @pytest.mark.parametrize(("device", "ranges"), [("AM68A", "qdq"), ("TDA4VM", "qdq"), ("TDA4VM", "clip")])
    def test_activations_of_4_bits(self, device, ranges, tmp_path):
        x = torch.randn(4, 3, 16, 16)
        config = QATConfig(device, activations={"bits": 4})
        model = convert(calibrate(prepare_qat(hand_written(), config, x), [x]))
        with pytest.raises(ExportError, match="fewer than 8 bits"):
            export_tidl(model, tmp_path / "b", device, [x], ranges=ranges)
        assert list(tmp_path.iterdir()) == []

    def test_a_model_trained_for_another_device(self, converted, exported_once, tmp_path):
        with pytest.raises(ExportError, match=r"TIDL refuses .* on TDA4VM.*QATConfig\(target='TDA4VM'\)"):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "TDA4VM", [HUGGING_FACE["resnet"].pixels(2)])
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_is_not_converted(self, tmp_path):
        model = prepare_qat(hand_written(), QATConfig("AM68A"), torch.randn(2, 3, 16, 16))
        with pytest.raises(StageError, match="convert"):
            export_tidl(model, tmp_path / "b", "AM68A", [torch.randn(2, 3, 16, 16)])

    def test_a_processor_of_another_size(self, converted, exported_once, tmp_path):
        batch = [HUGGING_FACE["resnet"].pixels(2)]
        with pytest.raises(ExportError, match="224x224, the calibration data has 32x32"):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", batch, ViTImageProcessorPil())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "empty"),
            ([torch.full((1, 3, 32, 32), torch.nan)], "NaN"),
            (torch.zeros(1, 3, 32, 32), "one batch"),
            (BatchFeature({"pixel_values": torch.zeros(1, 3, 32, 32)}), "one batch"),
            ([torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 40, 32)], r"frame 1 holds .*40, 32\).* one size"),
        ],
        ids=["empty", "nan", "a tensor", "a batch of the processor", "two sizes"],
    )
    def test_bad_calibration_data(self, data, message, converted, tmp_path):
        with pytest.raises(CalibrationError, match=message):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", data)

    def test_arrays(self, converted, tmp_path):
        data = [{"pixel_values": np.zeros((1, 3, 32, 32), np.float32)}]
        with pytest.raises(CaptureError, match="give a tensor of torch"):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", data)

    def test_no_frames_at_all(self, converted, tmp_path):
        with pytest.raises(CalibrationError, match="frames=0"):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", [torch.ones(1, 3, 32, 32)], frames=0)

    def test_labels_by_name(self, converted, tmp_path):
        with pytest.raises(ConfigError, match="id2label, not label2id"):
            batch, numbers = [HUGGING_FACE["resnet"].pixels(2)], {f"class {k}": k for k in range(LABELS)}
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", batch, labels=numbers)

    def test_a_directory_that_holds_something_else(self, converted, exported_once, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ExportError, match="not empty and no bundle"):
            export_tidl(converted("resnet", "AM68A"), tmp_path, "AM68A", [HUGGING_FACE["resnet"].pixels(2)])
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_a_bundle_with_compiled_artifacts(self, converted, copied):
        directory = copied("resnet", "AM68A")
        (directory / "artifacts").mkdir()
        with pytest.raises(ExportError, match="holds a compiled model"):
            export_tidl(converted("resnet", "AM68A"), directory, "AM68A", [HUGGING_FACE["resnet"].pixels(2)])

    @pytest.mark.parametrize("labels", [["a", "b"], list("abcdef"), {1: "a"}], ids=["fewer", "more", "one"])
    def test_labels_that_are_not_those_of_the_model(self, labels, converted, tmp_path):
        batch = [HUGGING_FACE["resnet"].pixels(2)]
        with pytest.raises(ConfigError, match=f"labels names {len(labels)} classes.* tells {LABELS} apart"):
            export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", batch, labels=labels)

    def test_a_name_that_is_no_file_name(self, converted, tmp_path):
        with pytest.raises(ConfigError, match="name='google/vit'"):
            export_tidl(
                converted("resnet", "AM68A"),
                tmp_path / "b",
                "AM68A",
                [HUGGING_FACE["resnet"].pixels(2)],
                name="google/vit",
            )


class TwoInputs(nn.Module):
    """A classifier of a picture and a mask beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(pixel_values * pixel_mask)


class ForImageClassification(TwoInputs):
    """By its name one whose outputs edgeai-benchmark reads."""


class Trimaps(ViTImageProcessorPil):
    """Wants a map beside each image, as for mattes."""

    def __call__(self, images: object, trimaps: object, **options: object) -> object:
        return super().__call__(images, **options)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ForImageClassification, "this model takes more: pixel_values, pixel_mask"),
        (TwoInputs, "this model takes more"),
    ],
)
def test_a_model_of_several_inputs_has_frames_of_all_and_its_images_are_not_said_to_be_prepared(
    kind, reason, tmp_path
):
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "pixel_mask": torch.ones(3, 1, 16, 16)}
    model = convert(calibrate(prepare_qat(kind(), QATConfig("AM68A"), batch), [batch]))
    bundle = export_tidl(model, tmp_path / "b", "AM68A", [batch], Trimaps(size={"height": 16, "width": 16}))
    with np.load(bundle / "calibration" / "frame_000.npz") as frame:
        assert set(frame) == set(batch)
    text = (bundle / "README.md").read_text()
    assert reason in text and "photo.jpg" not in text and not (bundle / "config.yaml").exists()
    done = subprocess.run(
        [sys.executable, bundle / "infer.py", "--cpu", "--out", tmp_path / "outputs"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs").iterdir())) == 3


def test_an_earlier_bundle_is_replaced_as_a_whole(converted, copied, exported_once):
    directory = copied("resnet", "AM68A")
    batch = [HUGGING_FACE["resnet"].pixels(3)]
    export_tidl(converted("resnet", "AM68A"), directory, "AM68A", batch, labels=list("abcde"), name="net")
    assert {path.name for path in directory.iterdir()} == FILES - {"config.yaml"}
    assert [path.name for path in (directory / "model").iterdir()] == ["net.onnx"]
    assert "export_tidl got no processor" in (directory / "README.md").read_text()
    assert yaml.safe_load((directory / "dataset.yaml").read_text())["categories"][1]["name"] == "b"
    assert [path.name for path in directory.parent.iterdir()] == ["copy"]


@pytest.mark.slow
def test_labels_that_a_processor_shifts_are_named_as_the_data_name_them(converted, exported_once, tmp_path):
    processor = SegformerImageProcessorPil(size={"height": 64, "width": 64}, do_reduce_labels=True)
    batch = [scenes("segformer", 2, seed=1)[0]]
    directory = export_tidl(converted("segformer", "AM68A"), tmp_path / "b", "AM68A", batch, processor)
    config, data = (yaml.safe_load((directory / f"{name}.yaml").read_text()) for name in ("config", "dataset"))
    assert config["metric"] == {"label_offset_pred": 1}
    assert len(data["color_map"]) == LABELS + 1
    assert [category["id"] for category in data["categories"]] == [1, 2, 3, 4, 5]
    assert [category["name"] for category in data["categories"]] == [f"LABEL_{k}" for k in range(LABELS)]


@pytest.mark.slow
def test_a_plain_network_gets_a_bundle_without_config(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig("AM68A"), x), [x]))
    directory = export_tidl(model, tmp_path / "b", "J721S2", [x])
    assert [path.name for path in (directory / "model").iterdir()] == ["handwritten.onnx"]
    assert {path.name for path in directory.iterdir()} == FILES - {"config.yaml", "dataset.yaml"}


def test_the_palette_is_that_of_pascal_voc():
    colours = dataset("net", dict.fromkeys(range(6), "x"), colours=True)["color_map"]
    assert colours == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]


class Shifted(nn.Module):
    """A net whose call is more than one tensor by position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(
        self,
        image: Tensor | list[Tensor],
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        twice: bool = False,
    ) -> Tensor:
        """(N, 3, H, W), or a list of it and of (N, 4) to be added, → (N, 4)."""
        image, *more = image if isinstance(image, list) else [image]
        y = self.head(self.conv(image).relu().mean((2, 3)))
        for number in (scale, factor):
            y = y if number is None else y * number
        return sum([*more, *([] if shift is None else [shift])], 2 * y if twice else y)


PIXELS, OTHERS = torch.randn(4, 3, 8, 8), torch.randn(4, 4)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"shift": OTHERS, "image": PIXELS}, ["image", "shift"]),
        ({"image": [PIXELS, OTHERS]}, ["image_0", "image_1"]),
        (([PIXELS, OTHERS], None, OTHERS), ["image_0", "image_1", "shift"]),
        ({"image": PIXELS, "twice": True}, ["image"]),
        ({"image": PIXELS, "factor": torch.tensor(0.5)}, ["image", "factor"]),
    ],
    ids=["one left out", "a list", "a list and by position", "an option", "a single number"],
)
def test_a_bundle_of_a_model_that_is_called_with_more_than_tensors_in_a_row(batch, names, tmp_path):
    torch.manual_seed(0)
    model = convert(calibrate(prepare_qat(Shifted().eval(), QATConfig("AM68A"), batch), [batch]))
    directory = export_tidl(model, tmp_path / "bundle", "AM68A", [batch], frames=3)
    expected = model(**batch) if isinstance(batch, dict) else model(*batch)
    session = onnxruntime.InferenceSession(directory / "model" / "shifted.onnx")
    assert [value.name for value in session.get_inputs()] == names
    frames = sorted((directory / "calibration").iterdir())
    assert len(frames) == 3
    for frame, wanted in zip(frames, expected, strict=False):
        (got,) = session.run(None, dict(np.load(frame)))
        np.testing.assert_allclose(got[0], wanted.detach().numpy(), atol=0.02 * float(expected.abs().max()))
