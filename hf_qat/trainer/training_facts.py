"""How a model was trained, in the words of its card: what the Trainer did, not what it was asked to."""

from __future__ import annotations

from transformers import Trainer

from hf_qat.config.qat_config import QATConfig
from hf_qat.trainer.callbacks import freezing_of_batch_norm


def schedule_of(trainer: Trainer, config: QATConfig, distilled: bool) -> dict[str, object]:
    """Name → value; empty if the trainer has made no step.

    Args:
        trainer: after training, or in it.
        config: the recipe, for the fractions at which things freeze.
        distilled: whether a teacher taught too.
    """
    state, args = trainer.state, trainer.args
    if not state.global_step:
        return {}
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    schedule: dict[str, object] = {
        "Steps": f"{state.global_step} of {state.max_steps}",
        "Epochs": f"{state.epoch or 0:.4g}",
        "Images a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "Learning rate": f"{args.learning_rate:.4g}, {scheduler}; learned scales × {config.scale_lr_multiplier:.4g}",
        "Optimizer": str(getattr(args.optim, "value", args.optim)),
        "Weight decay": f"{args.weight_decay:.4g}",
        "Seed": args.seed,
        "Batch norm frozen": _moment(freezing_of_batch_norm(trainer.callback_handler.callbacks, config)),
        "Ranges frozen": _moment(config.freeze_ranges_at),
    }
    if args.bf16 or args.fp16:
        schedule["Mixed precision"] = "bfloat16" if args.bf16 else "float16"
    if distilled:
        schedule["Distillation"] = (
            f"weight {config.distillation_weight:.4g}, temperature {config.distillation_temperature:.4g}"
        )
    return schedule


def _moment(fraction: float) -> str:
    return f"after {fraction:.0%} of the steps" if fraction else "from the first step"
