"""From a trainer to files for others: the converted model, one directory with everything in it, and its card."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import HfQatError
from hf_qat.files.atomic import whole_directory
from hf_qat.files.manifest import write_manifest
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.analyze import analyze
from hf_qat.model.conversion import convert
from hf_qat.model.state import require_stage
from hf_qat.publish.accuracy import MEASURED_AS, Accuracy
from hf_qat.publish.card import CardFacts, CardOptions, render
from hf_qat.publish.directory import CARD, ONNX, PLOT, TIDL, write_contents
from hf_qat.publish.figures import save_accuracy
from hf_qat.publish.summary import summarize
from hf_qat.tidl.artifacts import ARTIFACTS
from hf_qat.trainer.fsdp import is_sharded
from hf_qat.trainer.measuring import measure
from hf_qat.trainer.mixed_precision import forget_mixed_precision
from hf_qat.trainer.suspicions import warn_of_lost_accuracy


logger = logging.get_logger(__name__)

#: Where `push_to_hub` exports to, below `output_dir`: beside the checkpoints to resume from, which it does not push.
EXPORT_DIRECTORY = "export"

#: An exported file is compared with its model on at least so many inputs, or on all there are.
VERIFIED_INPUTS = 128

#: The analysis of a model card looks at so many batches.
ANALYZED_BATCHES = 2

#: Where the `datasets` library has a file of the Hub from: `hf://datasets/user/name@revision/path`.
HUB_FILE = re.compile(r"hf://datasets/([^@]+)@")

#: Names that the `datasets` library gives to what it has read from files, or made of a generator.
FILE_KINDS = frozenset({"csv", "json", "pandas", "parquet", "text", "imagefolder", "generator"})


def converted_copy(model: nn.Module) -> nn.Module:
    """A converted copy of a trainer's prepared model, which stays as it is.

    Raises:
        StageError: neither calibrated nor trained.
    """
    model = copy.deepcopy(model)
    forget_mixed_precision(model)
    return convert(model)


def compiled_in(target: str) -> str:
    """Where an export holds what TI's compiler made, which is never replaced."""
    return f"{TIDL}/{target}/{ARTIFACTS}"


def export(
    trainer: Trainer,
    facts: CardFacts,
    options: CardOptions,
    given: Accuracy,
    inputs: Sequence[Mapping[str, Any]],
    directory: Path,
) -> CardFacts:
    """Write model, ONNX file, TIDL bundle and card to a directory, which appears as a whole or not at all.

    All processes take part, and the main one writes.

    Args:
        trainer: evaluates the model and the file.
        facts: what is known before; of the converted model.
        options: what only the user can know, for the card.
        given: what was measured elsewhere; it replaces our own figures.
        inputs: real ones, without labels, to verify the file on; in the main process.
        directory: absent, empty, or an earlier export without compiled artifacts.

    Returns:
        The facts with what was measured and written; in other processes than the main one as they were.

    Raises:
        ExportError: the model cannot be expressed as ONNX; the directory holds something else.
    """
    model, example = facts.model, inputs[0] if inputs else None
    if not trainer.is_world_process_zero():
        measure(trainer, facts.measured_as, model, None, example)
        return facts
    target = require_stage(model, Stage.CONVERTED, "export").config.target
    with whole_directory(directory, compiled_in(target)) as made:
        contents = write_contents(model, made, trainer.processing_class, inputs)
        measured = measure(trainer, facts.measured_as, model, made / ONNX, example)
        warn_of_lost_accuracy(measured, facts.measured_as, facts.images)
        accuracy = {**facts.accuracy, **measured, **given}
        summary = summarize(model, contents.onnx.float_ops)
        measured = {MEASURED_AS[stage]: accuracy[stage] for stage in MEASURED_AS if stage in accuracy}
        contents = replace(contents, plot=save_accuracy(measured, made / PLOT))
        facts = replace(facts, accuracy=accuracy, contents=contents, summary=summary)
        render(facts, options).save(made / CARD)
        write_manifest(made)
    return facts


def card_options(given: Mapping[str, Any]) -> CardOptions:
    """The arguments of `create_model_card`, by keyword.

    Raises:
        TypeError: an unknown one.
    """
    known = [field.name for field in fields(CardOptions)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; create_model_card takes {', '.join(known)}")
    return CardOptions(**given)


def dataset_name(dataset: object) -> str | None:
    """What a data set of the `datasets` library is called: its id on the Hub if it came from there, or its own name.

    `None` if it has none, or only that of a kind of file.
    """
    info = getattr(dataset, "info", None)
    for source in getattr(info, "download_checksums", None) or {}:
        if found := HUB_FILE.match(source):
            return found[1]
    name = getattr(dataset, "builder_name", None)
    return None if name is None or name in FILE_KINDS else str(name)


def analysis_for_card(trainer: Trainer, inputs: Sequence[Mapping[str, Any]]) -> Analysis | None:
    """Every layer of a trainer's model against itself in float; `None` where there are no inputs for it.

    A model that FSDP2 has split is left alone. All else of an export is of use without it, so a reason why it cannot
    be had is logged, and not raised.
    """
    model = trainer.model
    if not inputs or model is None or is_sharded(model) or not trainer.is_world_process_zero():
        return None
    try:
        return analyze(model, [dict(batch) for batch in inputs], num_batches=ANALYZED_BATCHES, sensitivity=False)
    except HfQatError as error:
        logger.warning(f"The model card has no analysis of the layers: {error}")
        return None
