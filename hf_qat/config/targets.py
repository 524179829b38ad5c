"""What a device computes: the numeric schemes of its weights and activations, as data.

Sources: ONNX `QuantizeLinear` (opset 17 knows int8 and uint8), ONNX Runtime's QDQ rules, and Texas Instruments'
`quantization_scale_type` option (1: power-of-two, symmetric, per tensor; 4: asymmetric activations, per-channel
weights).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from hf_qat.errors import ConfigError


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor (all weights, or all activations) is quantized.

    Attributes:
        bits: width of the codes, 2 to 8, or 16.
        symmetric: `zero_point` is 0; otherwise affine (unsigned codes, any `zero_point`).
        per_channel: one scale per output channel (weights only).
        power_of_two: scales are restricted to powers of two.
        learned: scales (and the offsets of affine tensors) are trained: LSQ, Esser et al. 2020; LSQ+, Bhalgat et al.
            2020.
        observer: how calibration finds the first range: `"mse"`, `"minmax"` or `"percentile"`; without learned scales,
            `"moving_average"` also goes on following the range in training.
    """

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = False
    power_of_two: bool = False
    learned: bool = True
    observer: str = "mse"


@dataclass(frozen=True)
class Restrictions:
    """What a device's layers cannot do, though its schemes could: nothing by default.

    Attributes:
        symmetric_input: what enters the model has zero_point 0.
        symmetric_operations: names of rules (`hf_qat.graph.rules`) of operations whose inputs and outputs have it too.
        symmetric_products: the result of an activation × activation product has it, as its inputs do by
            `Target.symmetric_matmul`.
        per_tensor_transposed: the weights of transposed convolutions have one scale, and what they read and make has
            zero_point 0.
        pair_before_activation: the result of a layer is rounded before an activation that a quantizer cannot compute
            by clamping, such as SiLU: only ReLU belongs to the layer.
        wide_norm_inputs: what layer norms read, in transformers all sums, has `Target.edge_bits`: a row that few codes
            make equal has no variance, and gradients grow `1 / sqrt(eps)` times there.
    """

    symmetric_input: bool = False
    symmetric_operations: frozenset[str] = frozenset()
    symmetric_products: bool = False
    per_tensor_transposed: bool = False
    pair_before_activation: bool = False
    wide_norm_inputs: bool = False


@dataclass(frozen=True)
class Target:
    """One entry of the table of targets.

    Attributes:
        name: the name a user writes.
        aliases: other names of the same device (TI's SoC part numbers).
        weights, activations: the schemes.
        edge_bits: width of the first convolution, of the last linear layer, and of what enters and leaves the model,
            where it differs from the schemes.
        symmetric_matmul: both inputs of an activation × activation product must have zero_point 0.
        one_sign_in_products: both inputs of such a product must be signed, or both unsigned.
        one_type_where_tensors_meet: all tensors that meet in an add or a concatenation share signedness, which is what
            lets ONNX Runtime use an integer kernel.
        widest_activations: the most bits that it has for activations.
        restrictions: what its layers cannot do; `QATConfig(layer_restrictions=False)` leaves them out.
        description: one line for `hf-qat --help` and the documentation.
    """

    name: str
    weights: TensorScheme
    activations: TensorScheme
    aliases: tuple[str, ...] = ()
    edge_bits: int | None = None
    symmetric_matmul: bool = False
    one_sign_in_products: bool = False
    one_type_where_tensors_meet: bool = False
    widest_activations: int = 16
    restrictions: Restrictions = Restrictions()
    description: str = ""


def check_schemes(where: str, weights: TensorScheme, activations: TensorScheme) -> None:
    """Refuse mixes that no quantizer can honour."""
    if not weights.symmetric:
        raise ConfigError(
            f"{where}: weights must be symmetric; a zero point on them would cost a correction in every "
            "multiplication, which no target computes. Remove symmetric=False."
        )
    if activations.per_channel:
        raise ConfigError(
            f"{where}: activations cannot have a scale per channel, as the next layer sums over channels, and sums of "
            "codes need one scale. Remove per_channel=True."
        )
    for kind, scheme in (("weights", weights), ("activations", activations)):
        if scheme.learned and scheme.observer == "moving_average":
            raise ConfigError(
                f'{where}: {kind} have learned=True and observer="moving_average", but learned scales take over after '
                'calibration and leave nothing to follow. Choose observer="mse", or set learned=False.'
            )


_PER_CHANNEL = TensorScheme(per_channel=True)
_PER_CHANNEL_4 = TensorScheme(bits=4, per_channel=True)
_POWER_OF_TWO = TensorScheme(power_of_two=True)
_AFFINE = TensorScheme(symmetric=False)
_AFFINE_4 = TensorScheme(bits=4, symmetric=False)

#: edgeai-tidl-tools, docs/quantization.md, "TIDL Layer Quantization Restrictions": asymmetric activations of
#: convolutions, fully connected layers, softmax, layer norm, concatenations and additions only, and of what passes
#: codes on whole (flatten, reshape, transpose). GELU and SiLU are its BatchNormLayer.
_TIDL_SYMMETRIC = frozenset(
    "mul div sub rsub maximum minimum mean sum batch_norm prelu gelu silu sigmoid hardsigmoid tanh elu celu selu relu "
    "relu6 avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d max_pool2d adaptive_max_pool2d "
    "amax amin upsample_bilinear2d upsample_linear1d upsample_nearest2d upsample_nearest1d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d grid_sampler grid_sampler_2d "
    "slice select split split_with_sizes chunk unbind narrow roll flip squeeze pad index gather index_select "
    "pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
_TIDL = Restrictions(
    symmetric_input=True,
    symmetric_operations=_TIDL_SYMMETRIC,
    symmetric_products=True,
    per_tensor_transposed=True,
    pair_before_activation=True,
)

#: The table of targets. A new device is a new row, from outside by `register_target`.
#:
#: The first four run on ONNX Runtime, where unsigned activations are the fast ones and an add or a concatenation is an
#: integer kernel only if its inputs and its output have one type. First and last layers of the 4-bit targets keep
#: 8 bits, as in LSQ (Esser et al. 2020, §3).
#:
#: The others are Texas Instruments' devices. Schemes: edgeai-tidl-tools, docs/tidl_fsg_quantization.md (TDA4VM has the
#: first matrix accelerator, MMAv1: `quantization_scale_type` 1; the others MMAv2: 4). Products of two activations:
#: edgeai-tidl-tools, docs/supported_ops_rts_versions.md (on TDA4VM no mix of signed and unsigned inputs of a MatMul),
#: and `adjust_matmul_inputs_qconfig` of edgeai-torchmodelopt, which makes both inputs symmetric.
TARGETS: list[Target] = [
    Target(
        "int8",
        weights=_PER_CHANNEL,
        activations=_AFFINE,
        one_type_where_tensors_meet=True,
        description="8 bits: weights int8 per channel, activations uint8 with a zero point; fastest on ONNX Runtime",
    ),
    Target(
        "int8-symmetric",
        weights=_PER_CHANNEL,
        activations=TensorScheme(),
        one_type_where_tensors_meet=True,
        description="8 bits: weights int8 per channel, activations without a zero point",
    ),
    Target(
        "w4a8",
        weights=_PER_CHANNEL_4,
        activations=_AFFINE,
        edge_bits=8,
        one_type_where_tensors_meet=True,
        description="weights 4 bits per channel (8 in the first and the last layer), activations uint8",
    ),
    Target(
        "w4a4",
        weights=_PER_CHANNEL_4,
        activations=_AFFINE_4,
        edge_bits=8,
        one_type_where_tensors_meet=True,
        restrictions=Restrictions(wide_norm_inputs=True),
        description="weights 4 bits per channel (8 in the first and the last layer), activations 4 bits unsigned (8 "
        "where layer norms read them)",
    ),
    Target(
        "TDA4VM",
        weights=_POWER_OF_TWO,
        activations=_POWER_OF_TWO,
        aliases=("J721E",),
        symmetric_matmul=True,
        one_sign_in_products=True,
        widest_activations=8,
        restrictions=_TIDL,
        description="TI TDA4VM: 8 bits, power-of-two scales, one per tensor, no zero points",
    ),
    Target(
        "AM62A",
        weights=_PER_CHANNEL,
        activations=_AFFINE,
        symmetric_matmul=True,
        widest_activations=8,
        restrictions=_TIDL,
        description="TI AM62A: 8 bits, weights per channel, activations with a zero point",
    ),
    Target(
        "AM67A",
        weights=_PER_CHANNEL,
        activations=_AFFINE,
        aliases=("J722S",),
        symmetric_matmul=True,
        widest_activations=8,
        restrictions=_TIDL,
        description="TI AM67A: 8 bits, weights per channel, activations with a zero point",
    ),
    Target(
        "AM68A",
        weights=_PER_CHANNEL,
        activations=_AFFINE,
        aliases=("J721S2",),
        symmetric_matmul=True,
        widest_activations=8,
        restrictions=_TIDL,
        description="TI AM68A: 8 bits, weights per channel, activations with a zero point",
    ),
    Target(
        "AM69A",
        weights=_PER_CHANNEL,
        activations=_AFFINE,
        aliases=("J784S4",),
        symmetric_matmul=True,
        widest_activations=8,
        restrictions=_TIDL,
        description="TI AM69A: 8 bits, weights per channel, activations with a zero point",
    ),
]


def register_target(target: Target) -> None:
    """Add a row to the table, whose name and aliases recipes then know.

    Raises:
        ConfigError: a spelling is taken, or no quantizer can honour the schemes.
    """
    taken = {spelling.lower(): known.name for known in TARGETS for spelling in (known.name, *known.aliases)}
    for spelling in (target.name, *target.aliases):
        if spelling.lower() in taken:
            raise ConfigError(f"a target {spelling!r} exists already: {taken[spelling.lower()]}")
    check_schemes(f"target {target.name!r}", target.weights, target.activations)
    TARGETS.append(target)


def targets() -> list[str]:
    """Names of the known targets, in the order of the table; `find_target` knows their aliases too."""
    return [target.name for target in TARGETS]


def find_target(name: str) -> Target:
    """The target that a name or an alias stands for, in upper or lower case.

    Raises:
        ConfigError: no such target; the message names the nearest one and lists all.
    """
    spellings = {spelling: target for target in TARGETS for spelling in (target.name, *target.aliases)}
    for spelling, target in spellings.items():
        if isinstance(name, str) and name.lower() == spelling.lower():
            return target
    known = [f"{t.name} (or {', '.join(t.aliases)})" if t.aliases else t.name for t in TARGETS]
    raise ConfigError(f"unknown target {name!r}.{did_you_mean(name, spellings)} Known targets: {', '.join(known)}.")


def did_you_mean(wrong: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` Did you mean "x"?`, with the nearest of the known names, or nothing where none is near.

    Args:
        wrong: what the user wrote.
        known: the names that would have been right.
        cutoff: how alike, from 0 to 1, the nearest one must be to be worth naming; 0 always names one.
    """
    lower = {name.lower(): name for name in known}
    nearest = get_close_matches(str(wrong).lower(), lower, n=1, cutoff=cutoff)
    return f" Did you mean {lower[nearest[0]]!r}?" if nearest else ""
