"""`save_pretrained` and `from_pretrained`, as users call them: both kinds of checkpoint, here and in new processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.trainer_utils import validate_quantization_for_training

from hf_qat.checkpoints.hf_quantizer import QATHfQuantizer
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError, StageError, WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state import state_of
from hf_qat.quantization.converted import QuantizedLayer
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import HUGGING_FACE, LABELS, Case, made_once, spread


ROOT = Path(__file__).parents[1]


def _model(name: str, config: str, **fields: Any) -> nn.Module:
    cls = getattr(transformers, name)
    return spread(cls(getattr(transformers, config)(**fields)))


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 32, "patch_size": 8}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_labels": LABELS}

MORE: dict[str, Callable[[], nn.Module]] = {
    "dinov2": partial(_model, "Dinov2ForImageClassification", "Dinov2Config", **DINO, **IMAGE),
    "deit": partial(_model, "DeiTForImageClassification", "DeiTConfig", **TRANSFORMER, **IMAGE, num_labels=LABELS),
    "beit": partial(_model, "BeitForImageClassification", "BeitConfig", **TRANSFORMER, **IMAGE, num_labels=LABELS),
    "clip": partial(_model, "CLIPForImageClassification", "CLIPConfig", vision_config={**TRANSFORMER, **IMAGE}),
    "resnet backbone": partial(_model, "ResNetBackbone", "ResNetConfig", **STAGES, out_features=["stage1", "stage2"]),
    "vit for masked images": partial(
        _model, "ViTForMaskedImageModeling", "ViTConfig", **TRANSFORMER, **IMAGE, encoder_stride=8
    ),
}
CASES = HUGGING_FACE | {name: Case(make, 32, lambda batch, size: None) for name, make in MORE.items()}
#: Models whose names transformers translates to those of older releases when it saves, besides ViT.
TRANSLATED = ("swin", "segformer", "dinov2")
#: What most tests look at: batch norms in one, attention in the other.
FEW = ("resnet", "vit")


def outputs(model: nn.Module, case: Case) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(dict(model.eval()(case.pixels(3, 2))))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@made_once
def prepared(name: str, config: QATConfig | None = None) -> nn.Module:
    case = CASES[name]
    model = prepare_qat(case.make().eval(), config, {"pixel_values": case.pixels(2)})
    return calibrate(model, [case.pixels(4, 1)])


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each of `FEW`, with `prepared` and `converted` in it, and what each computes."""
    directories = {}
    for name in FEW:
        model, directory = prepared(name), tmp_path_factory.mktemp(name)
        for stage in ("prepared", "converted"):
            model = convert(model) if stage == "converted" else model
            model.save_pretrained(directory / stage)
            torch.save(outputs(model, CASES[name]), directory / f"{stage}.pt")
        directories[name] = directory
    return directories


def load(directory: Path, **options: Any) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_pretrained(directory, **options)


def run(program: str, *arguments: object) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Both kinds, here and elsewhere


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_a_loaded_model_computes_the_same_bits_and_is_saved_as_the_same_bytes(
    name: str, stage: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    model = load(saved[name] / stage)
    state = state_of(model)
    assert state is not None and state.stage == stage and state.config == QATConfig()
    assert same(outputs(model, CASES[name]), torch.load(saved[name] / f"{stage}.pt"))
    model.save_pretrained(tmp_path)
    again, first = tmp_path / "model.safetensors", saved[name] / stage / "model.safetensors"
    assert again.read_bytes() == first.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


LOAD_ALL = """
import sys, torch, transformers, hf_qat
from pathlib import Path
from torch.utils import _pytree as pytree
for directory in Path(sys.argv[1]).iterdir():
    cls = getattr(transformers, (directory / "class").read_text())
    pixels, expected = torch.load(directory / "expected.pt")
    with torch.no_grad():
        leaves = pytree.tree_leaves(dict(cls.from_pretrained(directory)(pixels)))
    got = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    print(directory.name, len(got) == len(expected) and all(map(torch.equal, got, expected)), sep=": ")
"""


def save_for_a_new_process(model: nn.Module, case: Case, directory: Path) -> None:
    model.save_pretrained(directory)
    torch.save((case.pixels(3, 2), outputs(model, case)), directory / "expected.pt")
    (directory / "class").write_text(type(model).__name__)


def test_both_kinds_load_in_a_new_process_bit_for_bit(saved: dict[str, Path], tmp_path: Path) -> None:
    places = [(name, stage) for name in FEW for stage in ("prepared", "converted")]
    for name, stage in places:
        save_for_a_new_process(load(saved[name] / stage), CASES[name], tmp_path / f"{name} {stage}")
    assert sorted(run(LOAD_ALL, tmp_path).splitlines()) == sorted(f"{name} {stage}: True" for name, stage in places)


@pytest.mark.slow
def test_quantized_models_of_all_tasks_load_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    assert len(CASES) >= 12
    for name, case in CASES.items():
        save_for_a_new_process(convert(prepared(name)), case, tmp_path / name)
    assert sorted(run(LOAD_ALL, tmp_path).splitlines()) == sorted(f"{name}: True" for name in CASES)


WITHOUT_US = """
import sys, torch, transformers
from pathlib import Path
for directory in map(Path, sys.argv[1:]):
    for stage in ("converted", "dequantized"):
        try:
            model = transformers.AutoModelForImageClassification.from_pretrained(directory / stage)
        except RuntimeError as error:
            print(type(error).__name__, "mismatched" in str(error), "hf_qat" in sys.modules)
            continue
        with torch.no_grad():
            logits = model(torch.load(directory / "pixels.pt")).logits
        expected = torch.load(directory / "dequantized.pt")
        print(torch.allclose(logits, expected, rtol=1e-4, atol=1e-4), "hf_qat" in sys.modules)
"""


def test_without_importing_us_codes_are_refused_and_dequantized_models_load(saved: dict[str, Path]) -> None:
    for name in FEW:
        model, directory = load(saved[name] / "converted").dequantize(), saved[name]
        model.save_pretrained(directory / "dequantized")
        assert "quantization_config" not in json.loads((directory / "dequantized/config.json").read_text())
        torch.save(CASES[name].pixels(3, 2), directory / "pixels.pt")
        torch.save(outputs(model, CASES[name])[0], directory / "dequantized.pt")
    lines = run(WITHOUT_US, *(saved[name] for name in FEW)).splitlines()
    assert lines == ["RuntimeError True False", "True False"] * len(FEW)


# Dequantization


def test_a_dequantized_weight_is_code_times_scale_and_its_batch_norm_the_bias(saved: dict[str, Path]) -> None:
    directory = saved["resnet"] / "converted"
    stored = load_file(directory / "model.safetensors")
    model = load(directory).dequantize()
    assert type(model) is transformers.ResNetForImageClassification and state_of(model) is None
    float_model = CASES["resnet"].make()
    assert model.state_dict().keys() == float_model.state_dict().keys()
    stem, layer = "resnet.embedder.embedder.convolution", model.resnet.embedder.embedder
    scale = stored[f"{stem}.weight_scale"].numpy().reshape(-1, 1, 1, 1)
    codes = stored[f"{stem}.weight"].numpy().reshape(8, 3, 7, 7)
    np.testing.assert_array_equal(layer.convolution.weight.detach().numpy(), codes.astype(np.float32) * scale)
    bias = (stored[f"{stem}.bias"] * stored[f"{stem}.bias_scale"]).numpy()
    x = np.zeros((1, 8, 2, 2), np.float32)
    got = layer.normalization(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, np.broadcast_to(bias.reshape(1, 8, 1, 1), x.shape), rtol=1e-5)


def test_a_dequantized_model_is_close_to_the_float_one_and_trains(saved: dict[str, Path]) -> None:
    model, float_model, case = (
        load(saved["resnet"] / "converted").dequantize(),
        CASES["resnet"].make(),
        CASES["resnet"],
    )
    expected, got = outputs(float_model, case)[0], outputs(model, case)[0]
    assert float((got - expected).norm() / expected.norm()) < 0.05
    model(case.pixels(2), labels=torch.arange(2)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Training checkpoints


@pytest.mark.parametrize("name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in TRANSLATED)])
def test_a_training_checkpoint_has_the_names_of_the_model_so_that_a_trainer_resumes_it(
    name: str, tmp_path: Path
) -> None:
    model = prepare_qat(CASES[name].make(), None, {"pixel_values": CASES[name].pixels(2)})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_a_loaded_training_checkpoint_trains_weights_and_scales(saved: dict[str, Path]) -> None:
    model, case = load(saved["resnet"] / "prepared"), CASES["resnet"]
    validate_quantization_for_training(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    model(case.pixels(4), labels=torch.arange(4)).loss.backward()
    optimizer.step()
    for key in ("resnet.embedder.embedder.convolution.weight", "classifier.1.weight_quantizer.log2_scale"):
        assert not torch.equal(model.state_dict()[key], before[key])


def test_a_loaded_training_checkpoint_converts_to_the_quantized_one(saved: dict[str, Path], tmp_path: Path) -> None:
    convert(load(saved["vit"] / "prepared")).save_pretrained(tmp_path)
    expected = saved["vit"] / "converted" / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_was_cast_in_training_is_loaded_as_it_was_saved(
    saved: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = load(saved["resnet"] / "prepared").to(dtype)
    model.save_pretrained(tmp_path)
    widened, case = model.float().eval(), CASES["resnet"]
    assert same(outputs(load(tmp_path).eval(), case), outputs(widened, case))


def test_a_training_checkpoint_saves_the_state_dict_that_it_is_given(saved: dict[str, Path], tmp_path: Path) -> None:
    model = load(saved["resnet"] / "prepared")
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(gathered))
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in gathered.items())


def test_another_number_of_labels_gets_a_new_head_and_asks_for_calibration(saved: dict[str, Path]) -> None:
    model, case = load(saved["resnet"] / "prepared", num_labels=7, ignore_mismatched_sizes=True), CASES["resnet"]
    assert outputs(model, case)[0].shape == (3, 7)
    head = model.classifier[1]
    assert head.weight.std() > 0
    limit = (head.weight.abs().amax(1) / 127).detach()
    torch.testing.assert_close(head.weight_quantizer.scale.detach(), limit, rtol=1e-4, atol=0)
    with pytest.raises(StageError, match="classifier.1"):
        convert(model)
    convert(calibrate(model, [case.pixels(4)]))


def test_a_quantized_checkpoint_takes_no_new_head(saved: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match=rf"codes for {LABELS} labels, and num_labels is 7.*Load the float model"):
        load(saved["resnet"] / "converted", num_labels=7, ignore_mismatched_sizes=True)


def test_initializing_finds_a_weight_that_takes_no_memory_while_codes_are_flat(saved: dict[str, Path]) -> None:
    """CLIP's blocks initialize the weights of their layers, also of those that were read."""
    model = load(saved["vit"] / "converted")
    layer = next(module for module in model.modules() if isinstance(module, QuantizedLayer))
    shape, layer._buffers["weight"] = layer.weight.shape, layer.codes.reshape(1, -1)
    assert layer.weight.is_meta and layer.weight.shape == shape


# Ways to load and to save


@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_a_checkpoint_in_several_files_is_one_model(stage: str, saved: dict[str, Path], tmp_path: Path) -> None:
    load(saved["resnet"] / stage).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(outputs(load(tmp_path), CASES["resnet"]), torch.load(saved["resnet"] / f"{stage}.pt"))


OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "auto": {"device_map": "auto"},
    "low memory": {"low_cpu_mem_usage": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_dtype_and_device_map_change_no_bit(
    stage: str, options: dict[str, Any], saved: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(saved["resnet"] / stage, **options)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert same(outputs(model, CASES["resnet"]), torch.load(saved["resnet"] / f"{stage}.pt"))


@pytest.mark.parametrize("device_map", [{"resnet": "cpu", "classifier": "disk"}, {"resnet": 0, "classifier": "cpu"}])
def test_a_model_is_not_spread_over_devices(device_map: dict[str, Any], saved: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"device_map spreads the model over .*cpu.*one device"):
        load(saved["resnet"] / "converted", device_map=device_map)


def test_a_float_checkpoint_is_prepared_if_a_config_is_passed(tmp_path: Path) -> None:
    case = CASES["resnet"]
    float_model = case.make().eval()
    float_model.config.image_size = 32
    float_model.save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=QATConfig("w4a8"))
    state = state_of(model)
    assert state is not None and (state.stage, state.config) == ("prepared", QATConfig("w4a8"))
    expected = prepare_qat(float_model, QATConfig("w4a8"), {"pixel_values": case.pixels(2)})
    assert same(outputs(model, case), outputs(expected, case))
    validate_quantization_for_training(model)


def test_a_training_checkpoint_is_not_prepared_a_second_time_by_a_config_that_says_nothing_of_it(
    saved: dict[str, Path],
) -> None:
    plain = transformers.AutoConfig.from_pretrained(saved["resnet"] / "prepared")
    del plain.quantization_config
    with pytest.raises(WeightsError, match=r"model.safetensors holds \d+ scales of quantizers.*leave out config="):
        load(saved["resnet"] / "prepared", config=plain, quantization_config=QATConfig())


def test_the_pipeline_finds_the_class_of_an_image(saved: dict[str, Path], tmp_path: Path) -> None:
    directory = saved["vit"] / "converted"
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    classify = transformers.pipeline("image-classification", model=str(directory), image_processor=processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    with torch.no_grad():
        logits = load(directory)(**processor(image, return_tensors="pt")).logits[0]
    expected = logits.softmax(0).max()
    best = classify(image)[0]
    assert best["label"] == f"LABEL_{int(logits.argmax())}" and best["score"] == pytest.approx(float(expected), 1e-5)


def test_a_backbone_is_found_by_its_auto_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of transformers 5.24, AutoBackbone asks the Hub for any name, also for that of a directory.
    hub = SimpleNamespace(repo_exists=lambda name: True)
    monkeypatch.setattr("transformers.models.auto.auto_factory.hf_api", lambda: hub, raising=False)
    monkeypatch.setattr("transformers.models.auto.auto_factory.repo_exists", hub.repo_exists, raising=False)
    model = convert(prepared("resnet backbone"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoBackbone.from_pretrained(str(tmp_path))
    assert loaded.out_features == ["stage1", "stage2"]
    assert same(outputs(loaded, CASES["resnet backbone"]), outputs(model, CASES["resnet backbone"]))
    assert type(loaded.dequantize()) is transformers.ResNetBackbone


@pytest.mark.parametrize("other", [transformers.ResNetModel, transformers.ViTForImageClassification])
def test_another_class_is_refused_with_both_names(saved: dict[str, Path], other: Any) -> None:
    with pytest.raises(WeightsError, match=rf"ResNetForImageClassification\b.*\b{other.__name__}"):
        other.from_pretrained(saved["resnet"] / "converted")


def test_a_state_dict_is_not_enough(saved: dict[str, Path]) -> None:
    directory = saved["resnet"] / "converted"
    config = transformers.AutoConfig.from_pretrained(directory)
    with pytest.raises(WeightsError, match="directory"):
        transformers.ResNetForImageClassification.from_pretrained(None, config=config, state_dict={})


# What is said of a model


def test_config_json_says_how_to_rebuild_the_model(saved: dict[str, Path]) -> None:
    for stage in ("prepared", "converted"):
        content = json.loads((saved["vit"] / stage / "config.json").read_text())["quantization_config"]
        checkpoint = content["checkpoint"]
        assert (content["quant_method"], content["target"], checkpoint["stage"]) == ("hf_qat", "int8", stage)
        assert checkpoint["transformers_version"] == transformers.__version__
        assert checkpoint["inputs"][1]["dict"]["pixel_values"]["tensor"] == [2, 3, 32, 32]
        assert checkpoint["operations"]["classifier"] == [": linear"]
        lines = checkpoint["operations"]["vit"]
        assert lines[0] == "embeddings.patch_embeddings.projection: conv2d"
        assert sum(line.count("softmax") for line in lines) == 2 and not any("reshape" in line for line in lines)
    assert QATConfig.from_pretrained(saved["vit"] / "converted") == QATConfig()


def test_preparing_a_model_leaves_others_of_the_same_config_alone(tmp_path: Path) -> None:
    model = CASES["resnet"].make()
    twin = type(model)(model.config)
    prepare_qat(model, None, {"pixel_values": CASES["resnet"].pixels(2)})
    assert model.resnet.config is model.config
    twin.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert state_of(load(tmp_path)) is None


def test_a_trainer_takes_a_converted_model_to_evaluate_it(saved: dict[str, Path]) -> None:
    model = load(saved["resnet"] / "converted")
    validate_quantization_for_training(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.hf_quantizer, QATHfQuantizer)


def test_a_hand_made_config_cannot_be_loaded(tmp_path: Path) -> None:
    model = CASES["resnet"].make()
    model.config.quantization_config = QATConfig()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="prepare_qat"):
        load(tmp_path)


@pytest.mark.slow
def test_every_quantizer_of_a_shared_module_is_saved(tmp_path: Path) -> None:
    stages = {"stem_channels": [3, 8, 8], "stage_in_channels": [8], "stage_mid_channels": [8], "depths": [1]}
    more = {"stage_out_channels": [16], "stage_num_blocks": [1], "stage_downsample": [False]}
    rest = {"stage_downsample_strides": [2], "stage_light_block": [False], "stage_kernel_size": [3]}
    fields = stages | more | rest | {"stage_numb_of_layers": [2], "embedding_size": 8, "hidden_sizes": [16]}
    model = _model("HGNetV2ForImageClassification", "HGNetV2Config", **fields, num_labels=LABELS).eval()
    case = Case(lambda: model, 32, lambda batch, size: None)
    prepare_qat(model, None, {"pixel_values": case.pixels(2)})
    assert model.avg_pool is model.classifier[0] and len(fake_quantizers(model.avg_pool)) == 1
    calibrate(model, [case.pixels(4, 1)])
    for directory in (tmp_path / "prepared", tmp_path / "converted"):
        model.save_pretrained(directory)
        assert same(outputs(load(directory), case), outputs(model, case))
        if directory.name == "prepared":
            convert(model)


# Figures


def _resnet50() -> nn.Module:
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def _vit_b() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [(_resnet50, 64), (_vit_b, 224)], ids=["ResNet-50", "ViT-B"])
def test_a_quantized_file_is_a_quarter_of_the_float_one(
    make: Callable[[], nn.Module], size: int, tmp_path: Path
) -> None:
    model, pixels = make().eval(), torch.randn(2, 3, size, size)
    model.save_pretrained(tmp_path / "float")
    prepare_qat(model, QATConfig(weights={"observer": "minmax"}), {"pixel_values": pixels})
    convert(calibrate(model, [pixels], bias_correction=False)).save_pretrained(tmp_path / "converted")
    sizes = {kind: (tmp_path / kind / "model.safetensors").stat().st_size for kind in ("float", "converted")}
    assert sizes["converted"] <= 0.27 * sizes["float"]
    assert any(isinstance(module, QuantizedLayer) for module in model.modules())
