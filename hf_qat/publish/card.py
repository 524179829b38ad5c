"""The model card: metadata that the Hub reads, and `model_card.md` filled with what is known; nothing is made up.

Metadata: https://github.com/huggingface/hub-docs/blob/main/modelcard.md. What was not measured is left out.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.export import ExportReport
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.table import cells, decibels
from hf_qat.publish.accuracy import MEASURED_AS, Accuracy
from hf_qat.publish.directory import PLOT, Contents
from hf_qat.publish.figures import figures
from hf_qat.publish.hub_tasks import loader_of, task_of
from hf_qat.publish.markdown import in_code, in_text
from hf_qat.publish.summary import Summary
from hf_qat.tidl.report import TidlReport
from hf_qat.version import __version__


TEMPLATE = Path(__file__).with_name("model_card.md")

#: Packages whose versions a card names.
PACKAGES = ("transformers", "torch", "onnx", "onnxruntime")

#: How the Hub names a repository that is not one of its oldest.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: The dataset of an evaluation that nobody has named; the metadata must have one.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class CardOptions:
    """What only the user can know; named as the arguments of `Trainer.create_model_card`."""

    language: str | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    dataset_args: str | list[str] | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        model: converted or prepared: its class, its config.
        repo_id: where it is, or is to be.
        config: the recipe.
        schedule: name → value, of the training as it went; empty without one.
        measured_as: what was done to the model, a key of `MEASURED_AS`.
        accuracy: what was measured; `images`: on how many.
        dataset: its id, where the data set itself knows it.
        summary, contents: `None` for a training checkpoint, which has neither.
        analysis: of each layer against the float model; `None` if there is none.
    """

    model: nn.Module
    repo_id: str
    config: QATConfig
    schedule: Mapping[str, object]
    measured_as: str
    accuracy: Accuracy
    images: int
    dataset: str | None
    summary: Summary | None = None
    contents: Contents | None = None
    analysis: Analysis | None = None


def render(facts: CardFacts, options: CardOptions) -> ModelCard:
    """The card of a repository."""
    task = task_of(facts.model)
    text: ModelCard = ModelCard.from_template(
        _metadata(facts, options, task.tag),
        template_path=str(TEMPLATE),
        title=options.model_name or facts.repo_id.rpartition("/")[2],
        base_model=_base_model(facts.model, options),
        class_name=type(facts.model).__name__,
        auto_class=loader_of(facts.model),
        task=task,
        repo_id=facts.repo_id,
        facts=facts,
        target=facts.config.target,
        target_description=facts.config.target_spec.description,
        metrics=list(dict.fromkeys(name for values in facts.accuracy.values() for name in values)),
        accuracy=[(label, facts.accuracy[key]) for key, label in MEASURED_AS.items() if key in facts.accuracy],
        plot=PLOT if facts.contents is not None and facts.contents.plot else None,
        analysis=[] if facts.analysis is None else [cells(layer)[:6] for layer in facts.analysis.layers],
        output_sqnr="" if facts.analysis is None else decibels(facts.analysis.output_sqnr),
        recipe=yaml.safe_dump(_recipe(facts.config), sort_keys=False, width=math.inf).strip(),
        onnx=None if facts.contents is None else facts.contents.onnx,
        session_options=None if facts.contents is None else facts.contents.onnx.session_options,
        inputs=() if facts.contents is None else facts.contents.inputs,
        verification=_verification(facts.contents.onnx) if facts.contents is not None else [],
        tidl=None if facts.contents is None else facts.contents.tidl,
        why_no_tidl="" if facts.contents is None else in_text(facts.contents.why_no_tidl),
        in_code=in_code,
        check=_check(facts.contents.tidl) if facts.contents is not None and facts.contents.tidl is not None else "",
        versions=_versions(),
    )
    return text


def _metadata(facts: CardFacts, options: CardOptions, task: str) -> ModelCardData:
    base = _base_model(facts.model, options)
    tasks = _listed(options.tasks)
    tags = [*_tags(facts), *_listed(options.tags)]
    results = _results(facts, options, tasks[0] if tasks else task)
    more: dict[str, Any] = {} if base is None else {"base_model_relation": "quantized"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=tasks[0] if tasks else task,
        base_model=base,
        language=options.language,
        license=options.license,
        datasets=_datasets(facts, options) or None,
        tags=list(dict.fromkeys(tags)),
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=(options.model_name or facts.repo_id.rpartition("/")[2]) if results else None,
        eval_results=results or None,
        **more,
    )


def _datasets(facts: CardFacts, options: CardOptions) -> list[str]:
    """Ids on the Hub: those that the user gave, or the one that the data set knows of itself."""
    known = [facts.dataset] if facts.dataset and HUB_ID.fullmatch(facts.dataset) else []
    return _listed(options.dataset_tags) or known


def _tags(facts: CardFacts) -> list[str]:
    """Only what is true of this repository."""
    tags = ["hf_qat", *(["qat"] if facts.measured_as == "qat" else [])]
    if facts.summary is not None:
        tags += [f"int{bits}" for bits in reversed(facts.summary.bits)]
    if facts.contents is not None:
        tags += ["onnx", *(["tidl"] if facts.contents.tidl is not None else [])]
    return tags


def _results(facts: CardFacts, options: CardOptions, task: str) -> list[EvalResult]:
    """One entry of the model index for each metric of each row of the table."""
    ids = _listed(options.dataset_tags) or ([facts.dataset] if facts.dataset else [UNKNOWN])
    names = _listed(options.dataset) or ids
    return [
        EvalResult(
            task_type=task,
            dataset_type=ids[0],
            dataset_name=names[0],
            dataset_args=options.dataset_args,  # type: ignore[arg-type]  # Trainer's are text, and YAML takes it
            metric_type=metric,
            metric_name=f"{metric}, {label.replace('`', '')}",
            metric_value=float(figures(value)),
        )
        for key, label in MEASURED_AS.items()
        for metric, value in facts.accuracy.get(key, {}).items()
    ]


def _base_model(model: nn.Module, options: CardOptions) -> str | None:
    """The float model, if it is one of the Hub: nothing else can be linked to."""
    if options.finetuned_from is not None:
        return options.finetuned_from
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return name if HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _recipe(config: QATConfig) -> dict[str, Any]:
    """The config without what `save_pretrained` adds to rebuild the graph."""
    return config.with_checkpoint(None).to_dict()


def _verification(report: ExportReport) -> list[tuple[str, str, str, str]]:
    """A row each for ONNX Runtime without and with its optimizations: same class, difference, in steps."""
    rows = []
    for label, agreement in (("off", report.plain), ("on", report.optimized)):
        if agreement is not None:
            top1 = "" if agreement.top1_agreement is None else f"{agreement.top1_agreement:.2%}"
            steps = "" if agreement.max_output_lsb is None else str(agreement.max_output_lsb)
            rows.append((label, top1, f"{agreement.max_abs_diff:.3g}", steps))
    return rows


def _check(report: TidlReport) -> str:
    """The report, without the place where the file was made."""
    return str(report).replace(str(report.path), f"model/{report.path.name}")


def _versions() -> list[tuple[str, str]]:
    found = [("hf_qat", __version__), ("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:  # onnxruntime has many names, and only one of them is asked for
            continue
    return found


def _listed(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
