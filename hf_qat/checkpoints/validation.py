"""Look through the files of a checkpoint before a weight is read: they may be cut short, edited, or made to harm.

Reading a header costs nothing; of the content, only scales, zero points and codes are looked at. What is wrong is said
with file and key.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qat.errors import WeightsError
from hf_qat.graph.plan import join_path
from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer
from hf_qat.quantization.packing import unpack_nibbles
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.scales import USABLE, unusable
from hf_qat.quantization.weight_quantizer import QuantizedWeight


#: Names that safetensors has for the dtypes of our own state.
DTYPES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

#: What float weights of the model may lie in; reading them into float32 loses nothing.
FLOATS = ("F32", "BF16", "F16")


#: Where numbers that training learns are none any more.
DIVERGED = "The training that saved it had diverged, or the file is damaged"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: str
    key: str
    handle: Any

    @property
    def dtype(self) -> str:
        """The name that safetensors has for it, as `F32`."""
        return str(self.handle.get_slice(self.key).get_dtype())

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes; safetensors has checked them against the size of the file."""
        return tuple(self.handle.get_slice(self.key).get_shape())

    def read(self) -> Tensor:
        """The tensor."""
        tensor: Tensor = self.handle.get_tensor(self.key)
        return tensor

    def read_large(self) -> Tensor:
        """The same, by a handle of its own: what was read by the common one stays in memory until that is closed."""
        with safe_open(self.file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(self.key)
        return tensor

    def refuse(self, what: str, cause: str = "The file is damaged, or was changed by hand") -> WeightsError:
        """The error that says `what` of this tensor, and its likely `cause`."""
        return WeightsError(f"{self.file}: {self.key!r} {what}. {cause}: take another copy.")


def check_tensors(
    model: PreTrainedModel, stored: Mapping[str, Stored], codes: Mapping[str, tuple[int, ...]], other_labels: bool
) -> dict[str, torch.Size]:
    """Hold what the files say of themselves, and every scale in them, against a rebuilt model on the meta device.

    Args:
        model: prepared or converted.
        stored: the tensors of the checkpoint by key, see `open_tensors`.
        codes: key → stored shape of the integer codes of the quantized layers.
        other_labels: the model has another number of labels than the one that was saved, so shapes may differ.

    Returns:
        Key → shape in the model of the tensors that have another one in the file; empty unless `other_labels`.

    Raises:
        WeightsError: one of them does not fit; with file and key.
    """
    own = model.state_dict(keep_vars=True)
    _check_names(stored, own, type(model).__name__)
    ours = {tensor.key: tensor for tensor in _quantizer_tensors(model)}
    mismatched = {}
    for key, tensor in own.items():
        if key not in stored:
            continue  # tied: it is there under another name
        shape = codes.get(key, tuple(tensor.shape))
        exact = key in ours and not isinstance(ours[key].module, FakeQuantize)  # a model in training may be cast
        _check_dtype(stored[key], _dtypes(tensor, shape, key in codes, exact))
        if stored[key].shape != shape:
            if not other_labels:
                raise stored[key].refuse(f"has the shape {list(stored[key].shape)} instead of {list(shape)}")
            mismatched[key] = tensor.shape
    for key, tensor_of_ours in ours.items():
        if key in stored and key not in mismatched:
            tensor_of_ours.check(stored[key], tensor_of_ours.module)
    return mismatched


@contextmanager
def open_tensors(files: list[str], root: str) -> Iterator[dict[str, Stored]]:
    """The tensors of all files by key, while the files are open.

    Args:
        files: the safetensors files of the checkpoint.
        root: the directory that they were asked of, or the name of a repository.

    Raises:
        WeightsError: a file is outside of `root`, no safetensors, cut short, or repeats what another one holds.
    """
    _require_inside(files, root)
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
                keys = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{file} cannot be read as safetensors ({error}): it was cut short, or is something else."
                ) from error
            for key in keys:
                if key in stored:
                    raise WeightsError(f"{file}: {key!r} is in {stored[key].file} too; one of them does not belong.")
                stored[key] = Stored(file, key, handle)
        yield stored


def require_no_quantizers(files: list[str] | None) -> None:
    """Refuse a training checkpoint where a float one is about to be prepared: its scales would be left out.

    Args:
        files: of the checkpoint; those that are no safetensors pass.

    Raises:
        WeightsError: one of them holds the scale of a quantizer.
    """
    for file in files or ():
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as handle:
            scales = [key for key in list(handle.keys()) if key.endswith(".log2_scale")]
        if scales:
            raise WeightsError(
                f"{file} holds {len(scales)} scales of quantizers, for instance {scales[0]!r}, and the config of the "
                "model does not say where they belong. To load the prepared model, leave out config= and "
                "quantization_config=: the config.json beside the file has it all. To start over from the float "
                "weights, load_weights into the float model, and prepare that."
            )


def _require_inside(files: list[str], root: str) -> None:
    """An index names its files, and could name any file of this machine."""
    for file in files:
        path = Path(file)
        inside = ".." not in (path.relative_to(root).parts if path.is_relative_to(root) else path.parts)
        if os.path.isdir(root) and not path.is_relative_to(root) or not inside:
            raise WeightsError(f"{file}: the index of the checkpoint names a file outside of {root}.")
        if path.suffix != ".safetensors":
            raise WeightsError(f"{file}: a quantized model is read from safetensors only; a pickle can run code.")


def _check_names(stored: Mapping[str, Stored], own: Mapping[str, Tensor], model: str) -> None:
    for key, tensor in stored.items():
        if key not in own:
            raise WeightsError(
                f"{tensor.file}: {key[:200]!r} is no tensor of a {model}: it was saved from another model, or was "
                "added by hand."
            )
    there = {id(own[key]) for key in stored}
    missing = [key for key, tensor in own.items() if id(tensor) not in there]
    if missing:
        files = ", ".join(sorted({tensor.file for tensor in stored.values()}))
        raise WeightsError(
            f"{files}: {missing[0]!r} is missing, one of {len(missing)} tensors of a {model} that are: the file was "
            "saved from another model, or a part of the checkpoint is not there."
        )


def _dtypes(tensor: Tensor, shape: tuple[int, ...], is_code: bool, exact: bool) -> tuple[str, ...]:
    """Dtypes that the stored form of a tensor may have."""
    if is_code and math.prod(shape) != tensor.numel():
        return ("U8",)  # two in a byte
    if tensor.dtype == torch.float32 and not exact:
        return FLOATS
    return (DTYPES.get(tensor.dtype, str(tensor.dtype)),)


def _check_dtype(stored: Stored, allowed: tuple[str, ...]) -> None:
    if stored.dtype not in allowed:
        raise stored.refuse(f"is of {stored.dtype} instead of {' or '.join(allowed)}")


def _check_log2_scale(stored: Stored, module: FakeQuantize) -> None:
    _require_scale(stored, torch.exp2(stored.read().float()))


def _check_scale(stored: Stored, module: QuantizeDequantize | QuantizedLayer | QuantizedWeight) -> None:
    _require_scale(stored, stored.read())


def _require_scale(stored: Stored, scale: Tensor) -> None:
    bad = unusable(scale)
    if bad.numel():
        raise stored.refuse(f"gives a scale of {bad[0].item()}, and scales are {USABLE}", DIVERGED)


def _check_finite(stored: Stored, module: FakeQuantize) -> None:
    if not bool(stored.read().isfinite().all()):
        raise stored.refuse("holds NaN or infinity", DIVERGED)


def _check_count(stored: Stored, module: FakeQuantize) -> None:
    if int(stored.read()) < 0:
        raise stored.refuse("is negative, and counts batches")


def _check_zero_point(stored: Stored, module: QuantizeDequantize) -> None:
    spec = module.spec
    low, high = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    value = int(stored.read())
    if not low <= value <= high:
        raise stored.refuse(f"is the zero point {value}, outside of [{low}, {high}]")


def _check_codes(stored: Stored, module: QuantizedLayer | QuantizedWeight) -> None:
    spec = module.weight_spec
    codes = stored.read_large().flatten()
    if codes.dtype == torch.uint8:
        codes = unpack_nibbles(codes, module.codes.numel())
    low, high = (int(bound) for bound in torch.aminmax(codes))
    if low < spec.qmin or high > spec.qmax:
        raise stored.refuse(f"holds codes from {low} to {high}, outside of [{spec.qmin}, {spec.qmax}]")


Check = Callable[[Stored, Any], None]

#: For each kind of module that quantization adds or exchanges: its tensors in the state dict, and what must hold of
#: their values.
CHECKS: dict[type[nn.Module], dict[str, Check]] = {
    FakeQuantize: {
        "log2_scale": _check_log2_scale,
        "observed": _check_count,
        "offset": _check_finite,
        "range_min": _check_finite,
        "range_max": _check_finite,
    },
    QuantizeDequantize: {"scale": _check_scale, "zero_point": _check_zero_point},
    QuantizedWeight: {"weight": _check_codes, "scale": _check_scale},
    QuantizedLayer: {"weight": _check_codes, "weight_scale": _check_scale, "bias_scale": _check_scale},
}


@dataclass(frozen=True)
class _QuantizerTensor:
    """A tensor that quantization has added to the state dict, and what to check of it."""

    key: str
    module: nn.Module
    check: Check


def _quantizer_tensors(model: nn.Module) -> Iterator[_QuantizerTensor]:
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, checks in CHECKS.items():
            for name, check in checks.items() if isinstance(module, kind) else ():
                if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
                    yield _QuantizerTensor(join_path(path, name), module, check)
