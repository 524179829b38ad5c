"""What `check_tidl` reports: a verdict on each layer and on the whole file, with reasons and remedies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_qat.errors import printable


#: `refused`: TIDL does not compile the model, or computes something else than was trained. `arm`: the layer runs on
#: the Arm core, in float. `warning`: it runs on the accelerator, and there is something to know.
Verdict = Literal["refused", "arm", "warning"]

#: Of each rule, so many layers are named in the text; `to_dict` has all.
SHOWN = 3

HEADINGS: dict[Verdict, str] = {
    "refused": "TIDL refuses this:",
    "arm": "on the Arm core:",
    "warning": "to know:",
}

PREDICTION = "This is read from TI's documents; what TI's compiler says, in its log, counts."


@dataclass(frozen=True)
class Issue:
    """One broken rule.

    Attributes:
        verdict: how much it matters.
        rule: a short name, the same for all layers that break the same rule.
        layer: name of the node; empty for what concerns the whole file.
        operator: its ONNX operator.
        why: what is wrong, with the value.
        remedy: what to do.
        source: the document that states the rule.
    """

    verdict: Verdict
    rule: str
    layer: str
    operator: str
    why: str
    remedy: str
    source: str


@dataclass(frozen=True)
class LayerReport:
    """The verdict on one layer.

    Attributes:
        name, operator: of the node.
        runs_on: `"accelerator"`, `"arm"`, or `"refused"`.
        macs: multiplications with accumulation, for one input of the given shape.
        tidl_layer: TIDL's name for it; empty if it has none.
    """

    name: str
    operator: str
    runs_on: str
    macs: int
    tidl_layer: str = ""


@dataclass(frozen=True)
class TidlReport:
    """What `check_tidl` returns; `str()` of it is meant to be read.

    Attributes:
        path: the file.
        target, soc: the device.
        layers: in the order of the graph; quantizers and constants are none.
        issues: everything found, the worst first.
        subgraphs: how many parts TIDL compiles; between two of them data goes through the Arm core.
        notes: what holds for every model on this device.
    """

    path: Path
    target: str
    soc: str
    layers: list[LayerReport] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    subgraphs: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is refused; layers on the Arm core are only slow."""
        return not any(issue.verdict == "refused" for issue in self.issues)

    @property
    def macs(self) -> int:
        """Of the whole model."""
        return sum(layer.macs for layer in self.layers)

    @property
    def accelerated_macs(self) -> int:
        """Of the layers on the accelerator."""
        return sum(layer.macs for layer in self.layers if layer.runs_on == "accelerator")

    def on(self, place: str) -> list[LayerReport]:
        """The layers that run on `"accelerator"` or `"arm"`, or are `"refused"`."""
        return [layer for layer in self.layers if layer.runs_on == place]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON data; the path is only the name of the file."""
        return {
            "model": self.path.name,
            "target": self.target,
            "soc": self.soc,
            "ok": self.ok,
            "macs": self.macs,
            "accelerated_macs": self.accelerated_macs,
            "subgraphs": self.subgraphs,
            "issues": [vars(issue) for issue in self.issues],
            "layers": [vars(layer) for layer in self.layers],
            "notes": self.notes,
            "remark": PREDICTION,
        }

    def __str__(self) -> str:
        verdict = "TIDL takes it" if self.ok else "TIDL refuses it"
        lines = [f"{self.path} on {self.target} ({self.soc}): {verdict}", f"  {self._counts()}"]
        for kind, heading in HEADINGS.items():
            found = [issue for issue in self.issues if issue.verdict == kind]
            if found:
                lines += [f"  {heading}", *_described(found)]
        return "\n".join([*lines, f"  {PREDICTION}"])

    def _counts(self) -> str:
        accelerated = len(self.on("accelerator"))
        text = f"{accelerated} of {len(self.layers)} layers"
        if self.macs:
            text += f" and {self.accelerated_macs / self.macs:.1%} of {_amount(self.macs)}MACs"
        parts = "1 part" if self.subgraphs == 1 else f"{self.subgraphs} parts"
        return f"{text} on the accelerator, in {parts}"


def _amount(number: int) -> str:
    """In thousands, millions or milliards."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "


def _described(issues: Iterable[Issue]) -> list[str]:
    """Two lines for each rule and reason: which layers, why and what to do."""
    groups: dict[tuple[str, str, str, str], list[Issue]] = {}
    for issue in issues:
        groups.setdefault((issue.rule, issue.operator, issue.remedy, issue.source), []).append(issue)
    lines = []
    for (rule, operator, remedy, source), found in groups.items():
        subject = f"{operator} {_names(found)}: " if found[0].layer else ""
        reasons = Counter(issue.why for issue in found)
        why = "; ".join(list(reasons)[:SHOWN]) + ("; …" if len(reasons) > SHOWN else "")
        lines += [f"    [{rule}] {subject}{why}", f"      do: {remedy} ({source})"]
    return lines


def _names(issues: list[Issue]) -> str:
    shown = ", ".join(printable(issue.layer) for issue in issues[:SHOWN])
    rest = len(issues) - SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
