"""`load_weights`: from every kind of source into every kind of model, and what it says of it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_qat.checkpoints import sources
from hf_qat.checkpoints.load_weights import load_weights
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import HUGGING_FACE, hand_written, resnet, segformer, spread, swin, vit


def pixels(size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, size: int = 32) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixels(size)).logits


def prepared(seed: int = 1) -> nn.Module:
    model = prepare_qat(spread(hand_written(), seed), example_inputs=pixels())
    return calibrate(model, [pixels()], bias_correction=False).eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture
def donor() -> nn.Module:
    """A float model with other weights than those of the models that are loaded into."""
    return spread(hand_written(), 7).eval()


# Into a float model


def test_every_weight_of_a_state_dict_arrives_and_is_counted(donor: nn.Module) -> None:
    model = hand_written()
    report = load_weights(model, donor.state_dict(), strict=True)
    assert unchanged(model, donor.state_dict())
    assert report.matched == tuple(donor.state_dict())
    assert report.complete and not report.missing and not report.unexpected and not report.mismatched


def test_the_report_names_and_counts_what_does_not_fit_and_the_rest_is_loaded(
    donor: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hand_written()
    before = snapshot(model)
    state = {**donor.state_dict(), "head.weight": torch.zeros(9, 16), "fc.weight": torch.zeros(2)}
    del state["stem.weight"]
    report = load_weights(model, state)
    assert report.missing == ("stem.weight",)
    assert report.unexpected == ("fc.weight",)
    assert report.mismatched == ("head.weight",)
    assert report.shapes == {"head.weight": ((9, 16), (5, 16))}
    assert torch.equal(model.stem.weight, before["stem.weight"])
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.body.weight, donor.body.weight)
    # stem 1, body 2, norms 5 each, head 2: 15 keys, of which 13 fit.
    assert capsys.readouterr().out.splitlines() == [
        "Weights from a state dict:",
        "  matched      13 of 15",
        "  missing      1: stem.weight",
        "  unexpected   1: fc.weight",
        "  other shape  1: head.weight (9, 16) instead of (5, 16)",
    ]


def test_a_long_list_is_cut_and_the_rest_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(hand_written(), {**{f"x{k}": torch.zeros(1) for k in range(11)}, "head.bias": torch.zeros(5)})
    assert "unexpected   11: x0, x1, x2, x3, x4 and 6 more\n" in capsys.readouterr().out


def test_it_can_be_silent(donor: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(hand_written(), donor.state_dict(), verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_strict_refuses_what_does_not_fit_and_loads_nothing(donor: nn.Module, change: str) -> None:
    model, state = hand_written(), donor.state_dict()
    before = snapshot(model)
    key = {"missing": "head.bias", "unexpected": "fc.bias", "shape": "head.weight"}[change]
    if change == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(9)
    with pytest.raises(WeightsError, match=key):
        load_weights(model, state, strict=True)
    assert unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_loaded(donor: nn.Module, value: float) -> None:
    model, state = hand_written(), copy.deepcopy(donor.state_dict())
    before = snapshot(model)
    state["body.bias"][3] = value
    with pytest.raises(WeightsError, match=r"body\.bias holds NaN"):
        load_weights(model, state)
    assert unchanged(model, before)


def test_half_precision_is_loaded_into_float32(donor: nn.Module) -> None:
    model = hand_written()
    load_weights(model, {key: v.half() if v.is_floating_point() else v for key, v in donor.state_dict().items()})
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight, donor.head.weight, rtol=1e-3, atol=1e-6)


def test_the_prefix_of_data_parallel_is_stripped(donor: nn.Module) -> None:
    model = hand_written()
    load_weights(model, nn.ModuleDict({"module": donor}).state_dict(), strict=True)
    assert unchanged(model, donor.state_dict())


@pytest.mark.parametrize("is_prepared", [False, True], ids=["float", "prepared"])
def test_a_checkpoint_of_lightning_is_read(is_prepared: bool, donor: nn.Module, tmp_path: Path) -> None:
    module = nn.ModuleDict({"model": donor, "criterion": nn.CrossEntropyLoss(weight=torch.ones(3))})
    torch.save({"epoch": 3, "state_dict": module.state_dict(), "optimizer_states": [{}]}, tmp_path / "last.ckpt")
    model = prepared() if is_prepared else hand_written()
    report = load_weights(model, tmp_path / "last.ckpt")
    assert report.unexpected == ("criterion.weight",) and not report.missing
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in donor.state_dict().items())


def test_of_a_student_and_a_teacher_neither_is_taken_for_the_model(donor: nn.Module) -> None:
    both = nn.ModuleDict({"student": donor, "teacher": hand_written()})
    with pytest.raises(WeightsError, match=r"no tensor of .*its keys are student\.stem.*of the model stem\.weight"):
        load_weights(hand_written(), both.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "model_ema"])
def test_what_timm_and_torchvision_save_with_their_options_is_read(key: str, donor: nn.Module, tmp_path: Path) -> None:
    torch.save({key: donor.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    model = hand_written()
    load_weights(model, tmp_path / "last.pth.tar", strict=True)
    assert unchanged(model, donor.state_dict())


def test_the_prefix_stays_where_the_model_has_it_too(donor: nn.Module) -> None:
    wrapper = nn.ModuleDict({"module": hand_written()})
    load_weights(wrapper, nn.ModuleDict({"module": donor}).state_dict(), strict=True)
    assert unchanged(wrapper["module"], donor.state_dict())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")  # of PyTorch's own, as torch.compile is imported
def test_the_prefixes_of_compile_and_of_the_models_own_wrapper_are_no_difference(donor: nn.Module) -> None:
    compiled = torch.compile(donor)
    assert all(key.startswith("_orig_mod.") for key in compiled.state_dict())
    model = hand_written()
    load_weights(model, compiled.state_dict(), strict=True)
    assert unchanged(model, donor.state_dict())
    for source in (donor.state_dict(), nn.ModuleDict({"module": nn.ModuleDict({"module": donor})}).state_dict()):
        wrapper = nn.ModuleDict({"module": hand_written()})
        load_weights(wrapper, source, strict=True)
        assert unchanged(wrapper["module"], donor.state_dict())


def test_a_part_of_a_model_may_be_called_as_a_wrapper_is(donor: nn.Module) -> None:
    model = nn.ModuleDict({"module": hand_written(), "head": nn.Linear(2, 2)})
    report = load_weights(model, nn.ModuleDict({"module": donor}).state_dict())
    assert report.missing == ("head.weight", "head.bias") and not report.unexpected
    assert unchanged(model["module"], donor.state_dict())


def test_a_model_is_no_source() -> None:
    with pytest.raises(WeightsError, match=r"HandWritten, not a state dict: save model\.state_dict"):
        load_weights(hand_written(), hand_written())


def test_a_tensor_under_two_names_may_be_stored_under_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    model["b"] = model["a"]
    report = load_weights(model, {"a.weight": torch.ones(2, 2)}, strict=True)
    assert report.matched == ("a.weight", "b.weight")
    assert torch.equal(model["b"].weight, torch.ones(2, 2))


# From files


def as_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_torch_file(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def as_training_script(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"model": state, "epoch": 3}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def as_in_pytorchs_tutorial(state: dict[str, Tensor], folder: Path) -> Path:
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "loss": torch.tensor(0.5)}
    torch.save(content, folder / "checkpoint.tar")
    return folder / "checkpoint.tar"


def as_directory(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder


def as_old_directory(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def as_shards(state: dict[str, Tensor], folder: Path) -> Path:
    keys = list(state)
    shards = {"model-1.safetensors": keys[:4], "model-2.safetensors": keys[4:]}
    for name, part in shards.items():
        save_file({key: state[key] for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "write",
    [
        as_safetensors,
        as_torch_file,
        as_training_script,
        as_in_pytorchs_tutorial,
        as_directory,
        as_old_directory,
        as_shards,
    ],
)
@pytest.mark.parametrize("path_type", [str, Path])
def test_every_kind_of_file_is_read(
    donor: nn.Module, tmp_path: Path, write: Callable[[dict[str, Tensor], Path], Path], path_type: type
) -> None:
    model, source = hand_written(), path_type(write(donor.state_dict(), tmp_path))
    report = load_weights(model, source, strict=True)
    assert unchanged(model, donor.state_dict())
    assert report.source == str(source)


def test_a_name_that_is_no_path_is_looked_for_on_the_hub(
    donor: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_shards(donor.state_dict(), tmp_path)
    asked = []

    def hub(repository: str, name: str, **_: object) -> str | None:
        asked.append((repository, name))
        return str(tmp_path / name) if (tmp_path / name).is_file() else None

    monkeypatch.setattr(sources, "cached_file", hub)
    model = hand_written()
    load_weights(model, "owner/model", strict=True)
    assert unchanged(model, donor.state_dict())
    assert asked[0] == ("owner/model", "model.safetensors")


def test_without_a_connection_a_hub_name_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(WeightsError, match="owner/no-such-model"):
        load_weights(hand_written(), "owner/no-such-model")


@pytest.mark.parametrize("name", ["nowhere.pth", "./nowhere", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "cached_file", None)
    with pytest.raises(WeightsError, match="no file or directory"):
        load_weights(hand_written(), name)


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none of model\.safetensors"):
        load_weights(hand_written(), tmp_path)


def test_a_missing_shard_is_named(donor: nn.Module, tmp_path: Path) -> None:
    (as_shards(donor.state_dict(), tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2\.safetensors, which is not there"):
        load_weights(hand_written(), tmp_path)


@pytest.mark.parametrize("name", ["../model-2.safetensors", "/etc/passwd", "model.safetensors.index.json", 3, None])
def test_an_index_that_names_anything_but_weights_beside_it_is_refused(name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"conv.weight": name}}))
    with pytest.raises(WeightsError, match="no name of a file of weights beside it"):
        load_weights(hand_written(), tmp_path)


@pytest.mark.parametrize("write", [as_safetensors, as_torch_file])
def test_a_file_that_was_cut_short_is_named(
    donor: nn.Module, tmp_path: Path, write: Callable[[dict[str, Tensor], Path], Path]
) -> None:
    file = write(donor.state_dict(), tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(WeightsError, match=f"{file.name} cannot be read"):
        load_weights(hand_written(), file)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_pickle_is_not_run(donor: nn.Module, tmp_path: Path) -> None:
    torch.save({**donor.state_dict(), "trap": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"save model\.state_dict\(\)"):
        load_weights(hand_written(), tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}], ids=["list", "number"])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="state dict"):
        load_weights(hand_written(), tmp_path / "x.pt")


# What save_pretrained wrote, under names that transformers has given up


@pytest.mark.parametrize("make", [vit, swin, segformer, resnet])
def test_a_saved_hugging_face_model_is_loaded_into_a_float_one(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    saved, model = spread(make(), 7), make()
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path, strict=True)
    assert torch.equal(logits(model), logits(saved))


def test_the_names_that_transformers_writes_are_other_than_the_model_has(tmp_path: Path) -> None:
    """Or else the test above would show nothing."""
    model = vit()
    model.save_pretrained(tmp_path)
    assert sources.read_weights(tmp_path).keys() != model.state_dict().keys()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_saved_hugging_face_model_is_loaded_into_a_prepared_one(name: str, tmp_path: Path) -> None:
    make = HUGGING_FACE[name].make
    saved = spread(make(), 7)
    saved.save_pretrained(tmp_path, max_shard_size="10KB")
    model = prepare_qat(make())
    report = load_weights(model, tmp_path, strict=True)
    assert set(report.uncalibrated) == model.state_dict().keys() - saved.state_dict().keys()
    expected = logits(saved)
    with fake_quant_disabled(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_body_saved_alone_lacks_only_the_head(tmp_path: Path) -> None:
    saved, model = spread(vit(), 7), vit()
    saved.vit.save_pretrained(tmp_path)
    report = load_weights(model, tmp_path)
    assert report.missing == ("classifier.weight", "classifier.bias")
    assert not report.unexpected
    assert torch.equal(model.vit.layernorm.weight, saved.vit.layernorm.weight)


def test_what_a_deeper_model_has_more_is_reported_under_the_names_in_its_file(tmp_path: Path) -> None:
    vit(layers=3).save_pretrained(tmp_path)
    report = load_weights(vit(layers=2), tmp_path)
    assert not report.missing
    assert set(report.unexpected) == {key for key in sources.read_weights(tmp_path) if ".layer.2." in key}


def test_a_weight_that_was_stored_in_one_piece_is_split(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, use_swiglu_ffn=True
    )
    saved, model = (transformers.Dinov2ForImageClassification(config) for _ in range(2))
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path, strict=True)
    assert torch.equal(logits(model), logits(saved))


def test_a_training_checkpoint_under_old_names_is_loaded_too(tmp_path: Path) -> None:
    saved = calibrate(prepare_qat(spread(vit(), 7)), [pixels(32)], bias_correction=False)
    state = transformers.core_model_loading.revert_weight_conversion(vit(), saved.state_dict())
    assert state.keys() != saved.state_dict().keys()
    model = prepare_qat(vit())
    load_weights(model, state, strict=True)
    assert torch.equal(logits(model), logits(saved))


# Into a prepared model


def test_a_float_checkpoint_leaves_the_ranges_to_be_calibrated_and_says_so(
    donor: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    model = prepared()
    report = load_weights(model, donor.state_dict(), strict=True)
    assert report.complete and "stem.weight_quantizer.log2_scale" in report.uncalibrated
    assert "quantizers without stored ranges: calibrate." in capsys.readouterr().out
    assert all(int(quantizer.observed) == 0 for quantizer in fake_quantizers(model).values())
    with torch.no_grad(), fake_quant_disabled(model):
        torch.testing.assert_close(model(pixels()), donor(pixels()), rtol=0, atol=1e-4)


def test_an_incomplete_float_checkpoint_leaves_the_ranges_to_be_calibrated_too(donor: nn.Module) -> None:
    model, state = prepared(), donor.state_dict()
    del state["head.weight"], state["head.bias"]
    report = load_weights(model, state)
    assert report.missing == ("head.weight", "head.bias")
    assert all(int(quantizer.observed) == 0 for quantizer in fake_quantizers(model).values())
    largest = model.body_norm.weight * (model.body_norm.running_var + 1e-5).rsqrt()
    largest = (donor.body.weight * largest.view(-1, 1, 1, 1)).abs().amax((1, 2, 3))
    torch.testing.assert_close(model.body.weight_quantizer.scale.detach(), (largest / 127).detach(), rtol=1e-5, atol=0)


def test_a_training_checkpoint_gives_back_the_very_model(tmp_path: Path) -> None:
    saved, model = prepared(), prepare_qat(hand_written(), example_inputs=pixels()).eval()
    report = load_weights(model, as_safetensors(saved.state_dict(), tmp_path), strict=True)
    assert report.uncalibrated == ()
    assert torch.equal(model(pixels(seed=3)), saved(pixels(seed=3)))


def test_some_but_not_all_quantizer_keys_are_an_error_and_nothing_is_loaded() -> None:
    model, state = prepared(), prepared(2).state_dict()
    before = snapshot(model)
    del state["body.weight_quantizer.observed"]
    with pytest.raises(WeightsError, match=r"body\.weight_quantizer\.observed"):
        load_weights(model, state)
    assert unchanged(model, before)


# Into a converted model


def test_a_converted_state_is_loaded_into_a_converted_model() -> None:
    saved, model = convert(prepared(1)), convert(prepared(2))
    assert not torch.equal(saved(pixels()), model(pixels()))
    load_weights(model, saved.state_dict(), strict=True)
    assert torch.equal(saved(pixels()), model(pixels()))


@pytest.mark.parametrize("target", ["int8", "w4a4"])
def test_a_quantized_checkpoint_is_loaded_into_a_converted_model(target: str, tmp_path: Path) -> None:
    def converted(seed: int) -> nn.Module:
        model = prepare_qat(spread(resnet(), seed), QATConfig(target), pixels(32))
        return convert(calibrate(model, [pixels(32)], bias_correction=False))

    saved, model = converted(1), converted(2)
    assert not torch.equal(logits(saved), logits(model))
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path, strict=True)
    assert torch.equal(logits(saved), logits(model))


@pytest.mark.parametrize("kind", ["float", "prepared"])
def test_float_weights_are_refused_by_a_converted_model(kind: str, donor: nn.Module) -> None:
    model = convert(prepared())
    before = snapshot(model)
    source = donor if kind == "float" else prepared(2)
    with pytest.raises(WeightsError, match="and convert again"):
        load_weights(model, source.state_dict())
    assert unchanged(model, before)


def test_a_part_of_a_converted_state_is_refused_even_if_not_strict() -> None:
    model, state = convert(prepared(1)), convert(prepared(2)).state_dict()
    before = snapshot(model)
    del state["stem.weight"]
    with pytest.raises(WeightsError, match=r"missing      1: stem\.weight"):
        load_weights(model, state)
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", ["float", "prepared"])
def test_integer_codes_are_refused_by_a_model_that_is_not_converted(kind: str, donor: nn.Module) -> None:
    model = donor if kind == "float" else prepared()
    with pytest.raises(WeightsError, match=r"torch\.int8 in the source"):
        load_weights(model, convert(prepared(2)).state_dict())
