"""compile.py and infer.py on a stand-in, which keeps what it is handed; and the artifacts brought back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_qat import export_tidl
from hf_qat.errors import ExportError
from hf_qat.tidl import pack_artifacts
from tests.models import HUGGING_FACE, LABELS
from tests.tidl.cases import DEVICES, FRAMES, MODELS, TRANSFORMERS, scenes
from tests.tidl.test_bundle import HOSTILE


LEVELS = onnxruntime.GraphOptimizationLevel


def test_hostile_class_names_are_data_in_every_file_and_do_not_move_the_terminal(
    converted, exported_once, stand_in, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "bundle"
    processor = ViTImageProcessorPil(size={"height": MODELS["resnet"].size, "width": MODELS["resnet"].size})
    batches = [{"pixel_values": scenes("resnet", FRAMES, seed=1)[0]}]
    export_tidl(converted("resnet", "AM68A"), directory, "AM68A", batches, processor, HOSTILE, frames=FRAMES)
    assert json.loads((directory / "runtime_options.json").read_text())["labels"] == dict(
        zip(map(str, range(5)), HOSTILE, strict=True)
    )
    stand_in.run(directory / "compile.py")
    pack_artifacts(directory)
    for name in ("dataset.yaml", "config.yaml", "param.yaml"):
        assert yaml.safe_load((directory / name).read_text())
    categories = yaml.safe_load((directory / "dataset.yaml").read_text())["categories"]
    assert [category["name"] for category in categories] == HOSTILE
    for name in ("README.md", "compile.py", "infer.py"):
        text = (directory / name).read_text()
        assert not any(label in text for label in HOSTILE)
    capsys.readouterr()
    stand_in.run(directory / "infer.py", "--out", str(tmp_path / "outputs"))
    printed = capsys.readouterr().out
    assert HOSTILE[0] in printed and "?]0;title?" in printed
    assert printed.replace("\n", "").isprintable()
    assert not list(tmp_path.rglob("made"))


PAIRS = [
    pytest.param(name, device, "qdq", marks=[] if name == "resnet" else pytest.mark.slow)
    for name in MODELS
    for device in DEVICES
]


@pytest.mark.parametrize(("name", "device", "ranges"), [*PAIRS, ("resnet", "TDA4VM", "clip")])
def test_compiling_and_inferring_hand_over_options_and_frames_as_documented(
    name, device, ranges, copied, stand_in, tmp_path, capsys
):
    directory = copied(name, device, ranges)
    stand_in.run(directory / "compile.py")
    stand_in.run(directory / "infer.py", "--out", str(tmp_path / "outputs"))

    compiling, inferring = stand_in.sessions
    assert compiling["providers"] == ["TIDLCompilationProvider", "CPUExecutionProvider"]
    assert inferring["providers"] == ["TIDLExecutionProvider", "CPUExecutionProvider"]
    options, cpu = compiling["options"]
    expected = {
        "tidl_tools_path": "/opt/tidl_tools",
        "artifacts_folder": str(directory / "artifacts"),
        "tensor_bits": 8,
        "accuracy_level": 0,
        "debug_level": 0,
        "max_num_subgraphs": 16,
        "advanced_options:quantization_scale_type": 1 if device == "TDA4VM" else 4,
        "advanced_options:calibration_frames": FRAMES,
        "advanced_options:calibration_iterations": -1,
        "advanced_options:max_num_subgraph_nodes": 2000,
        "advanced_options:add_data_convert_ops": 3,
    }
    if ranges == "qdq":
        expected["advanced_options:prequantized_model"] = 1
        expected["advanced_options:quant_params_proto_path"] = ""
    assert options == expected and cpu == {}
    assert inferring["options"][0]["artifacts_folder"] == str(directory / "artifacts")
    level = LEVELS.ORT_DISABLE_ALL if name in TRANSFORMERS else LEVELS.ORT_ENABLE_ALL
    assert {compiling["level"], inferring["level"]} == {level}
    pixels = scenes(name, FRAMES + 3, seed=1)[0][:FRAMES].numpy()
    for session in stand_in.sessions:
        assert session["path"] == str(directory / "model" / f"{name}.onnx")
        np.testing.assert_array_equal(np.concatenate([frame["pixel_values"] for frame in session["frames"]]), pixels)
    outputs = np.load(tmp_path / "outputs" / "frame_004.npz")["logits"]
    assert outputs.shape[:2] == (1, LABELS)
    printed = capsys.readouterr().out
    assert f"frame {FRAMES} of {FRAMES}" in printed and ("LABEL_" in printed) == (name != "segformer")


def test_an_image_is_prepared_as_the_processor_does(copied, stand_in, tmp_path):
    directory = copied("resnet", "AM68A")
    stand_in.run(directory / "compile.py")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "photo.png")
    stand_in.run(directory / "infer.py", str(tmp_path / "photo.png"), "--out", str(tmp_path / "outputs"))
    wanted = ViTImageProcessorPil(size={"height": 32, "width": 32})(images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(stand_in.sessions[-1]["frames"][0]["pixel_values"], wanted, atol=1 / 127.5)
    assert (tmp_path / "outputs" / "photo.npz").is_file()


def test_a_turned_photo_is_put_upright_and_16_bits_are_read_whole(copied, stand_in, tmp_path):
    """Orientation 6 in Exif: what a camera held on its side has taken, to be turned clockwise by a quarter."""
    directory = copied("resnet", "AM68A")
    stand_in.run(directory / "compile.py")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    images = [str(tmp_path / name) for name in ("turned.png", "deep.png")]
    stand_in.run(directory / "infer.py", *images, "--out", str(tmp_path / "outputs"))
    upright = [np.rot90(pixels, -1), np.stack([pixels[..., 0]] * 3, -1)]
    wanted = ViTImageProcessorPil(size={"height": 32, "width": 32})(images=upright, return_tensors="np")
    for frame, image in zip(stand_in.sessions[-1]["frames"], wanted["pixel_values"], strict=True):
        np.testing.assert_allclose(frame["pixel_values"][0], image, atol=1 / 127.5)


def test_images_of_one_name_in_two_directories_have_outputs_each(copied, stand_in, tmp_path):
    images = [tmp_path / place / "photo.png" for place in ("a", "b")]
    for image in images:
        image.parent.mkdir()
        Image.new("RGB", (40, 40)).save(image)
    stand_in.run(
        copied("resnet", "AM68A") / "infer.py", "--cpu", *map(str, images), "--out", str(tmp_path / "outputs")
    )
    assert sorted(file.name for file in (tmp_path / "outputs").iterdir()) == ["0000_photo.npz", "0001_photo.npz"]


def test_without_tidl_the_model_runs_on_plain_onnx_runtime(copied, stand_in, tmp_path):
    stand_in.run(copied("resnet", "AM68A") / "infer.py", "--cpu", "--out", str(tmp_path / "outputs"))
    assert stand_in.sessions[0]["providers"] == ["CPUExecutionProvider"]


def test_a_bundle_needs_neither_pytorch_nor_this_package(copied, tmp_path):
    """In a new process, where importing them fails; the classes that it prints are those of ONNX Runtime here."""
    directory = copied("resnet", "AM68A")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "photo.png")
    (tmp_path / "alone.py").write_text(
        textwrap.dedent("""
            import runpy, sys
            for name in ("hf_qat", "torch", "transformers", "onnx", "datasets"):
                sys.modules[name] = None
            sys.argv = sys.argv[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
        """)
    )
    arguments = ["alone.py", str(directory / "infer.py"), "--cpu", "photo.png", "--out", "outputs"]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(directory / "model" / "resnet.onnx", providers=["CPUExecutionProvider"])
    pixels = ViTImageProcessorPil(size={"height": 32, "width": 32})(images=image, return_tensors="np")["pixel_values"]
    wanted = session.run(None, {"pixel_values": pixels})[0]
    np.testing.assert_allclose(np.load(tmp_path / "outputs" / "photo.npz")["logits"], wanted, atol=0.1)


class TestTroubles:
    """Each ends with one line that says what to do."""

    def test_no_tools(self, copied, stand_in, monkeypatch):
        monkeypatch.delenv("TIDL_TOOLS_PATH")
        with pytest.raises(SystemExit, match="TIDL_TOOLS_PATH is not set: .*J721S2"):
            stand_in.run(copied("resnet", "AM68A") / "compile.py")

    def test_plain_onnxruntime(self, copied, stand_in, monkeypatch):
        directory, module = copied("resnet", "AM68A"), stand_in.module()
        module.get_available_providers = lambda: ["CPUExecutionProvider"]
        stand_in.module = lambda: module
        for script in ("compile.py", "infer.py"):
            with pytest.raises(SystemExit, match="not TI's onnxruntime"):
                stand_in.run(directory / script)

    def test_artifacts_that_are_there_already(self, copied, stand_in):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        with pytest.raises(SystemExit, match="is not empty"):
            stand_in.run(directory / "compile.py")

    def test_a_compiler_that_stops_half_way(self, copied, stand_in):
        directory = copied("resnet", "AM68A")
        stand_in.writes = ("allowedNode.txt",)
        with pytest.raises(SystemExit, match=r"did not write \*_tidl_net.bin, \*_tidl_io_\*.bin, onnxrtMetaData.txt"):
            stand_in.run(directory / "compile.py")
        assert not (directory / "artifacts" / "compiled_from.json").exists()

    @pytest.mark.parametrize(
        "content", [None, b"no picture", b"\x89PNG\r\n\x1a\n"], ids=["missing", "other", "cut off"]
    )
    def test_an_image_that_cannot_be_read(self, content, copied, stand_in, tmp_path):
        if content is not None:
            (tmp_path / "photo.png").write_bytes(content)
        with pytest.raises(SystemExit, match=r"cannot read .*photo\.png as an image: "):
            stand_in.run(copied("resnet", "AM68A") / "infer.py", "--cpu", str(tmp_path / "photo.png"))

    def test_images_without_what_prepares_them(self, copied, stand_in, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        with pytest.raises(SystemExit, match="yaml.*pip install pillow pyyaml"):
            stand_in.run(copied("resnet", "AM68A") / "infer.py", "--cpu", "photo.png")

    def test_inferring_before_compiling(self, copied, stand_in):
        with pytest.raises(SystemExit, match="holds no compiled model"):
            stand_in.run(copied("resnet", "AM68A") / "infer.py")


class TestPacking:
    """What a user brings back."""

    def test_artifacts_are_packed_with_param_yaml(self, copied, stand_in, bundled):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        assert pack_artifacts(directory, directory / "artifacts") == directory
        param = yaml.safe_load((directory / "param.yaml").read_text())
        assert param["session"]["artifacts_folder"] == "artifacts"
        assert param["session"]["model_folder"] == "model"
        assert param["session"]["model_path"] == "model/resnet.onnx"
        assert "artifacts/subgraph_0_tidl_net.bin" in (directory / "SHA256SUMS").read_text()

    def test_export_packs_them_into_the_same_bundle_made_again(
        self, copied, stand_in, converted, exported_once, tmp_path
    ):
        old = copied("resnet", "AM68A")
        stand_in.run(old / "compile.py")
        (old / "artifacts" / "tempDir").mkdir()
        batches = [HUGGING_FACE["resnet"].pixels(2)]
        new = export_tidl(
            converted("resnet", "AM68A"), tmp_path / "new", "AM68A", batches, artifacts=old / "artifacts"
        )
        assert (new / "artifacts" / "allowedNode.txt").read_text() == "stand-in"
        assert not (new / "artifacts" / "tempDir").exists()

    def test_a_bundle_packs_its_own_artifacts_and_packing_twice_changes_nothing(self, copied, stand_in, tmp_path):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        elsewhere = shutil.copytree(directory / "artifacts", tmp_path / "brought back")
        (directory / "artifacts" / "tempDir").mkdir()
        (directory / "artifacts" / "tempDir" / "log.txt").write_text("")
        pack_artifacts(directory)
        first = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        pack_artifacts(directory)
        pack_artifacts(directory, elsewhere)
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == first
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]

    def test_other_artifacts_of_the_same_model_do_not_replace_those_that_are_there(self, copied, stand_in, tmp_path):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        other = shutil.copytree(directory / "artifacts", tmp_path / "other")
        (other / "subgraph_0_tidl_net.bin").write_text("compiled again")
        with pytest.raises(ExportError, match="holds other artifacts"):
            pack_artifacts(directory, other)
        assert (directory / "artifacts" / "subgraph_0_tidl_net.bin").read_text() == "stand-in"
        shutil.rmtree(directory / "artifacts")
        (directory / "artifacts").mkdir()
        pack_artifacts(directory, other)
        assert (directory / "artifacts" / "subgraph_0_tidl_net.bin").read_text() == "compiled again"

    def test_nothing_is_packed_where_nothing_was_compiled(self, copied):
        directory = copied("resnet", "AM68A")
        before = sorted(path for path in directory.rglob("*"))
        with pytest.raises(ExportError, match="is no directory"):
            pack_artifacts(directory)
        assert sorted(path for path in directory.rglob("*")) == before

    def test_export_with_artifacts_of_another_model_leaves_nothing(
        self, copied, stand_in, converted, exported_once, tmp_path
    ):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        batches = [HUGGING_FACE["resnet"].pixels(2)]
        with pytest.raises(ExportError, match="another model or for another device"):
            export_tidl(
                converted("regnet", "AM68A"), tmp_path / "new", "AM68A", batches, artifacts=directory / "artifacts"
            )
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        "part", ["subgraph_0_tidl_net.bin", "subgraph_0_tidl_io_1.bin", "allowedNode.txt", "onnxrtMetaData.txt"]
    )
    def test_a_missing_or_empty_part_is_named(self, part, copied, stand_in):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        (directory / "artifacts" / part).write_text("")
        with pytest.raises(ExportError, match=f"{part} is empty"):
            pack_artifacts(directory, directory / "artifacts")
        (directory / "artifacts" / part).unlink()
        with pytest.raises(ExportError, match="did not end well. Run compile.py again"):
            pack_artifacts(directory, directory / "artifacts")
        assert not (directory / "param.yaml").exists()

    def test_artifacts_of_another_model_or_unknown_origin_are_refused(self, copied, stand_in):
        directory = copied("resnet", "AM68A")
        stand_in.run(directory / "compile.py")
        record = directory / "artifacts" / "compiled_from.json"
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "sha256": "0" * 64}))
        with pytest.raises(ExportError, match="another model or for another device"):
            pack_artifacts(directory, directory / "artifacts")
        record.write_text(json.dumps({**content, "target": "AM62A"}))
        with pytest.raises(ExportError, match="another model or for another device"):
            pack_artifacts(directory, directory / "artifacts")
        record.unlink()
        with pytest.raises(ExportError, match="which model was compiled"):
            pack_artifacts(directory, directory / "artifacts")

    def test_a_directory_that_is_no_bundle_is_refused(self, tmp_path):
        with pytest.raises(ExportError, match="is no bundle"):
            pack_artifacts(tmp_path, tmp_path)
