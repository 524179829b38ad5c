"""`Publisher`: the part of `QATTrainer` that turns what it trains into files, and brings them to the Hub."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from hf_qat.errors import ConfigError
from hf_qat.export.verify import require_onnxruntime
from hf_qat.files.atomic import whole_directory
from hf_qat.files.manifest import write_manifest
from hf_qat.graph.capture.inputs import LABEL_NAMES
from hf_qat.model.conversion import convert
from hf_qat.model.state import require_stage
from hf_qat.publish.accuracy import Accuracy, given_accuracy
from hf_qat.publish.card import CardFacts, CardOptions, render
from hf_qat.publish.directory import CARD, ONNX, TIDL, Contents, save_model, write_contents
from hf_qat.publish.hub import push_directory
from hf_qat.publish.summary import summarize
from hf_qat.tidl.artifacts import ARTIFACTS
from hf_qat.trainer.measuring import MeasuringTrainer
from hf_qat.trainer.random_state import random_state_kept
from hf_qat.trainer.training_facts import schedule_of


#: Where `push_to_hub` exports to, below `output_dir`: beside the checkpoints to resume from, which it does not push.
EXPORT_DIRECTORY = "export"

#: An exported file is compared with its model on at least so many inputs, or on all there are.
VERIFIED_INPUTS = 128

#: Names that the `datasets` library gives to what it has read from files, or made of a generator.
FILE_KINDS = frozenset({"csv", "json", "pandas", "parquet", "text", "imagefolder", "generator"})


class Publisher(MeasuringTrainer):
    """A Trainer whose prepared model can be exported, at any time; `trainer.model` stays as it is, and trains on."""

    def convert(self) -> nn.Module:
        """A converted copy of the model, for inference.

        Raises:
            StageError: neither calibrated nor trained.
        """
        model = copy.deepcopy(self.model)
        for name in ("forward", "_original_forward"):  # the wrapper that mixed precision puts around forward
            vars(model).pop(name, None)
        return convert(model)

    def save_quantized(self, directory: str | os.PathLike[str]) -> None:
        """Write the converted model, and what prepares its images, for `from_pretrained`.

        Raises:
            StageError: neither calibrated nor trained.
            ExportError: no Hugging Face model.
        """
        model = self.convert()  # in all processes: each may hold a part of the weights
        if self.is_world_process_zero():
            save_model(model, Path(directory), self.processing_class)
        self.accelerator.wait_for_everyone()

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Mapping[str, object]] | None = None,
        **card: Any,
    ) -> Path:
        """Write all that others need, ready to be a repository: int8 safetensors, ONNX, TIDL bundle and model card.

        The ONNX file is verified on real images, and on ONNX Runtime over the whole evaluation set if there is one
        with `compute_metrics`; so is the model. The directory appears as a whole or not at all.

        Args:
            directory: absent, empty, or an earlier export without compiled artifacts, which is replaced.
            metrics: what was measured elsewhere, for the card: `{"float": float_trainer.evaluate()}`.
            card: as in `create_model_card`.

        Returns:
            The directory.

        Raises:
            StageError: neither calibrated nor trained.
            ExportError: the model cannot be expressed as ONNX; the directory holds something else.
            ConfigError: an unknown stage in `metrics`.
        """
        directory, options, given = Path(directory), _card_options(card), given_accuracy(metrics)
        require_onnxruntime()
        model = self.convert()
        inputs = self._real_inputs()
        if not self.is_world_process_zero():
            self.measured(model, None)
        else:
            target = require_stage(model, "converted", "export").config.target
            with whole_directory(directory, f"{TIDL}/{target}/{ARTIFACTS}") as made:
                contents = write_contents(model, made, self.processing_class, inputs)
                accuracy = {**self.measured(model, made / ONNX), **given}
                facts = self._facts(model, accuracy, self._repository(directory.name), contents)
                render(facts, options).save(made / CARD)
                write_manifest(made)
        self.accelerator.wait_for_everyone()
        return directory

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """As Trainer's: the card of the training checkpoint in `output_dir`. `export` writes one of its own.

        Args:
            language, license, tags: metadata; tags are added to our own.
            model_name: the title; the name of the repository if left out.
            finetuned_from: the float model on the Hub; the one that the model was loaded from if left out.
            tasks: the Hub's name of the task, where it is not the usual one of the model's class.
            dataset_tags, dataset, dataset_args: ids, names and arguments of the data set of the evaluation.
        """
        if self.is_world_process_zero():
            options = CardOptions(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            output = Path(str(self.args.output_dir))
            facts = self._facts(self.model, dict(self._accuracy), self._repository(output.absolute().name))
            render(facts, options).save(output / CARD)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Export to `output_dir/export`, and bring that to the Hub, in one commit.

        The name of the repository, `private`, `revision` and `token` are those of the arguments (`hub_model_id`, or
        the name of `output_dir`; `hub_private_repo`, `hub_revision`, `hub_token`) where they are left out here.

        Args:
            commit_message: of the commit.
            blocking: must be true: a push in the background could fail unseen.
            token: with write permission.
            revision: a branch.
            private: of a new repository.
            kwargs: `metrics` of `export`, and the arguments of `create_model_card`.

        Returns:
            The commit; `None` in all processes but the main one.

        Raises:
            PublishError: with the command to go on. The export is whole then.
            StageError, ExportError, ConfigError: as `export`.
        """
        if not blocking:
            raise ConfigError("push_to_hub(blocking=False) could fail unseen: leave it out, or call it in a thread.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if "/" not in self._repository(""):
            self.init_hf_repo(token=token, private=private)  # only the Hub knows whose token it is
        directory = self.export(Path(str(self.args.output_dir)) / EXPORT_DIRECTORY, **kwargs)
        if not self.is_world_process_zero():
            return None  # type: ignore[return-value]  # as Trainer does
        self._finish_current_push()
        return push_directory(
            directory,
            self._repository(""),
            token=token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
            commit_message=commit_message or "End of training",
        )

    def _repository(self, otherwise: str) -> str:
        """The name of the repository, as far as it is known."""
        return str(self.hub_model_id or self.args.hub_model_id or otherwise)

    def _facts(
        self, model: nn.Module, accuracy: Accuracy, repository: str, contents: Contents | None = None
    ) -> CardFacts:
        config = require_stage(self.model, "prepared", "describe").config
        return CardFacts(
            model=model,
            repo_id=repository,
            config=config,
            schedule=schedule_of(self, config),
            stage=self.stage() or "quantized",
            accuracy=accuracy,
            images=self.evaluation_images(),
            dataset=_dataset_of(self.eval_dataset),
            summary=None if contents is None else summarize(model, contents.onnx.float_ops),
            contents=contents,
        )

    def _real_inputs(self) -> list[dict[str, Any]]:
        """The first inputs of the train set, or of the evaluation set: what an exported file is verified on."""
        inputs: list[dict[str, Any]] = []
        count, loader = 0, self._any_loader()
        if loader is None:
            return inputs
        with random_state_kept(self.args.device):
            for batch in self._inputs_of(loader):
                inputs.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), batch))
                count += len(next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
                if count >= VERIFIED_INPUTS:
                    break
        return inputs

    def _any_loader(self) -> DataLoader | None:
        """Of the train set; without one, of the evaluation set, or of the first of several."""
        if self.train_dataset is not None:
            return self.get_train_dataloader()
        if self.eval_dataset is None:
            return None
        return self.get_eval_dataloader(next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None)

    def _inputs_of(self, loader: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in loader:
            yield self._without_labels(batch)

    def _without_labels(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in {*LABEL_NAMES, *self.label_names}}


def _card_options(given: Mapping[str, Any]) -> CardOptions:
    known = list(asdict(CardOptions()))
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; create_model_card takes {', '.join(known)}")
    return CardOptions(**given)


def _dataset_of(dataset: object) -> str | None:
    """The name that a data set of the `datasets` library has of itself, if it is not that of a kind of file."""
    name = getattr(dataset, "builder_name", None)
    return None if name is None or name in FILE_KINDS else str(name)
