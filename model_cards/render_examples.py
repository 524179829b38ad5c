"""Writes the example cards beside it, each from a run of its own: `python model_cards/render_examples.py`.

Handwritten digits as in `hf-qat demo`: float training, calibration, QAT, export. About two minutes on two cores.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, Trainer

from hf_qat import QATConfig, QATTrainer
from hf_qat.cli.demo.digits import LABELS, Task, make_processor, make_task
from hf_qat.cli.demo.run import quiet
from hf_qat.cli.demo.training import LEARNING_RATE, arguments, compute_metrics, make_model
from hf_qat.publish.directory import CARD, PLOT


HERE = Path(__file__).parent
SEED = 0


def make_resnet() -> ResNetForImageClassification:
    """Two stages of two basic blocks, 0.17 million parameters."""
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 2],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    torch.manual_seed(SEED)
    return ResNetForImageClassification(config)


def render(name: str, model: PreTrainedModel, target: str, task: Task, work: Path, float_epochs: int) -> None:
    """Train, quantize and export a model, and keep its card."""
    data = {"train_dataset": task.train, "eval_dataset": task.test, "compute_metrics": compute_metrics}
    args = arguments(work / "float", SEED, float_epochs, LEARNING_RATE, weight_decay=0.05, warmup_steps=0.05)
    float_trainer = Trainer(model=model, args=args, **data)
    float_trainer.train()
    measured = float_trainer.evaluate()
    args = arguments(work / name, SEED, 3, 5e-4, hub_model_id=f"your-name/{name}")
    config = QATConfig(target)
    trainer = QATTrainer(model, args, qat_config=config, processing_class=make_processor(), **data)
    trainer.calibrate()
    trainer.evaluate()
    trainer.train()
    exported = trainer.export(
        work / "exported" / name, metrics={"float": measured}, dataset="Handwritten digits (scikit-learn)"
    )
    card = (exported / CARD).read_text(encoding="utf-8").replace(f"]({PLOT})", f"]({name}.png)")
    (HERE / f"{name}.md").write_text(card, encoding="utf-8")
    shutil.copy(exported / PLOT, HERE / f"{name}.png")


def main() -> None:
    """Both examples."""
    with quiet(), tempfile.TemporaryDirectory() as directory:
        work, task = Path(directory), make_task(make_processor(), SEED)
        render("digits-mobilenet-v2-am68a", make_model(SEED), "AM68A", task, work, float_epochs=20)
        render("digits-resnet-tda4vm", make_resnet(), "TDA4VM", task, work, float_epochs=8)


if __name__ == "__main__":
    main()
