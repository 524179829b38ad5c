"""A user's script that trains with FSDP2, saves, and resumes; on CPUs, where accelerate would not split a model.

accelerate launch --multi_gpu --num_processes 2 shard.py DIRECTORY STATE_DICT_TYPE
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import TrainerCallback

from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.training import arguments, images, recipe


RANK = int(os.environ.get("RANK", "0"))

#: What the model is asked at each save, in every process.
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class OnCPU(QATTrainer):
    """Has accelerate do on CPUs what its `AcceleratorState` does for FSDP on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


class Answers(TrainerCallback):
    """The logits that the split model itself gives to `PIXELS` when it is saved, by the name of the checkpoint."""

    def __init__(self) -> None:
        self.logits: dict[str, torch.Tensor] = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.logits[f"checkpoint-{state.global_step}"] = self.ask(model)

    def ask(self, model: torch.nn.Module) -> torch.Tensor:
        """(4, classes), in evaluation mode; batch norm and dropout are put back as they were."""
        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            logits = model.eval()(PIXELS).logits
        for module, training in modes:
            module.training = training
        model.reshard()  # an evaluation leaves the weights gathered
        return logits


def trainer_of(directory: Path, saved_as: str) -> OnCPU:
    """Eight steps, batch norm live for two, with a checkpoint after the fourth."""
    torch.manual_seed(RANK)
    changes = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": saved_as}}
    args = arguments(directory, max_steps=8, load_best_model_at_end=True, **changes, **sharding)
    data = {"train_dataset": images(80), "eval_dataset": images(16, seed=1)}
    return OnCPU(resnet(), args, qat_config=recipe(freeze_bn_at=0.25), **data)


def losses(trainer: OnCPU) -> list[float]:
    """Of all steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(directory: Path, saved_as: str) -> None:
    """Calibrate, evaluate, train, save, and train the second half again."""
    trainer = trainer_of(directory, saved_as)
    answers = Answers()
    trainer.add_callback(answers)
    trainer.calibrate()
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    answers.logits["."] = answers.ask(trainer.model)
    trainer.save_quantized(directory / "quantized")
    trainer.export(directory / "exported")
    again = trainer_of(directory, saved_as)
    again.train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    trainer.model.reshard()  # an evaluation leaves the weights gathered
    weight = trainer.model.classifier[1].weight
    found = {
        "class": type(trainer.model).__name__,
        "local": tuple(weight.to_local().shape),
        "losses": losses(trainer),
        "resumed": losses(again),
        "logits": answers.logits,
        "buffers": {name: buffer.clone() for name, buffer in trainer.model.named_buffers()},
        "scales": {path: q.scale.detach().clone() for path, q in fake_quantizers(trainer.model).items()},
    }
    torch.save(found, directory / f"{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits with them
