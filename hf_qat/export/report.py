"""What an export reports: what the file holds, and how far ONNX Runtime and torch agree on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_qat.model.in_float import FloatOperation, by_reason


#: A relative change of inputs that nobody sees: what a model makes of it, it may make of another order of sums.
PERTURBATION = 1e-5


@dataclass(frozen=True)
class Agreement:
    """How far ONNX Runtime, in one setting, agrees with torch.

    Attributes:
        top1_agreement: share of predictions with the same best class, 0 to 1; `None` for outputs without classes.
        max_output_lsb: largest difference in an output, in steps of that output's quantizer; `None` if none has one,
            and where the difference is infinite.
        max_abs_diff: largest difference in an output; infinite where one side alone is not finite, or both hold NaN.
        relative_error: root of the summed squares of the differences, relative to that of torch's outputs: the largest
            of all outputs. Differences within one step of an output's quantizer count as none.
    """

    top1_agreement: float | None
    max_output_lsb: int | None
    max_abs_diff: float
    relative_error: float = 0.0


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` and `verify_onnx` return; `str()` of it is meant to be read.

    Attributes:
        path: the file; `size`: its bytes.
        opset: the version of ONNX's default operators, as the file states it.
        num_quantize_nodes: number of `QuantizeLinear` nodes.
        float_ops: operator → names of the nodes that compute with unquantized numbers; empty if all is quantized.
        float_operations: the operations of the model's graphs that stay in float, each with its reason; also those
            between two quantizers, which compute with quantized numbers.
        samples: number of inputs that were compared; 0 without verification.
        plain: agreement with ONNX Runtime's optimizations off: nothing but the order of float sums may differ.
        optimized: agreement with all of them on, which is how most people run the file.
        sensitivity: the `Agreement.relative_error` of the model in torch against itself, its inputs changed by
            `PERTURBATION`; 0 where nothing asked for it.
        session_options: entries for `SessionOptions.add_session_config_entry` without which ONNX Runtime does not load
            the file with optimizations on.
    """

    path: Path
    size: int
    opset: int
    num_quantize_nodes: int
    float_ops: dict[str, list[str]] = field(default_factory=dict)
    float_operations: tuple[FloatOperation, ...] = ()
    samples: int = 0
    plain: Agreement | None = None
    optimized: Agreement | None = None
    sensitivity: float = 0.0
    session_options: dict[str, str] = field(default_factory=dict)

    @property
    def agreements(self) -> list[Agreement]:
        """The comparisons that were made."""
        return [agreement for agreement in (self.plain, self.optimized) if agreement is not None]

    @property
    def top1_agreement(self) -> float | None:
        """The lower of the two, with optimizations off and on; `None` if not compared."""
        return min((a.top1_agreement for a in self.agreements if a.top1_agreement is not None), default=None)

    @property
    def max_output_lsb(self) -> int | None:
        """The larger of the two; `None` if not compared."""
        return max((a.max_output_lsb for a in self.agreements if a.max_output_lsb is not None), default=None)

    @property
    def max_abs_diff(self) -> float | None:
        """The larger of the two; `None` if not compared."""
        return max((a.max_abs_diff for a in self.agreements), default=None)

    def __str__(self) -> str:
        lines = [f"{self.path}: opset {self.opset}, {self.num_quantize_nodes} quantizers, {self.size / 1e6:.2f} MB"]
        lines += self._in_float()
        if self.plain is None or self.optimized is None:
            return "\n".join([*lines, "  not verified on ONNX Runtime"])
        lines.append(f"  ONNX Runtime against torch on {self.samples} inputs:")
        for label, agreement in (("optimizations off", self.plain), ("optimizations on", self.optimized)):
            lines.append(f"    {label + ':':<19} {_describe(agreement)}")
        if self.sensitivity:
            lines.append(
                f"    torch against itself, inputs {PERTURBATION:g} off: {self.sensitivity:.0%} of the outputs"
            )
        for key, value in self.session_options.items():
            lines.append(f"    loads with optimizations only after add_session_config_entry({key!r}, {value!r})")
        return "\n".join(lines)

    def _in_float(self) -> list[str]:
        """A line of the file's operators, and one for each reason that the model's graphs know."""
        reasons = [
            f"    {reason}: {_counted(operations)}" for reason, operations in by_reason(self.float_operations).items()
        ]
        nothing = "only between quantizers" if reasons else "nothing"
        return [f"  in float: {_counted(self.float_ops) or nothing}", *reasons]


def _counted(places: Mapping[str, Sequence[str]]) -> str:
    """`Conv (stem/Conv), 2 Gemm (head/Gemm, …)`; a place without a name is the model itself."""
    return ", ".join(
        f"{operator} ({names[0] or 'the model'})" if len(names) == 1 else f"{len(names)} {operator} ({names[0]}, …)"
        for operator, names in places.items()
    )


def _describe(agreement: Agreement) -> str:
    parts = []
    if agreement.top1_agreement is not None:
        parts.append(f"top-1 agreement {agreement.top1_agreement:.2%}")
    difference = f"largest difference {agreement.max_abs_diff:.3g}"
    if agreement.max_output_lsb is not None:
        difference += f" ({agreement.max_output_lsb} LSB)"
    return ", ".join([*parts, difference])
