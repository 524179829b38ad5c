"""Small detectors that learn shapes on clutter from scratch in minutes, and their files on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from hf_qat.cli.demo.shapes import IMAGE_SIZE, KINDS, shapes_dataset
from hf_qat.cli.tasks import detection
from tests.patches import train_patches


SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
NAMES = {"id2label": dict(enumerate(KINDS)), "label2id": {kind: number for number, kind in enumerate(KINDS)}}


@dataclass(frozen=True)
class Detector:
    """A model, and how it is trained in float.

    Attributes:
        make: a new one.
        processor: its image processor.
        images: so many it learns from.
        steps: of the float training.
        options: of its `TrainingArguments`.
        qat_steps, qat_share: of the training after it; its learning rate as a share of the float one's. A twentieth is
            what README advises at 8 bits; a transformer wants more.
        begin: (model, rows, steps of the float training) → what is trained before, in place.
    """

    make: Callable[[], nn.Module]
    processor: Any
    images: int
    steps: int
    options: dict[str, Any]
    qat_steps: int = 300
    qat_share: float = 1 / 20
    begin: Callable[[Any, list[dict[str, Any]], int], None] | None = None


def rt_detr(**changes: Any) -> RTDetrForObjectDetection:
    """0.4 million parameters: 20 queries, selected from three levels of a ResNet."""
    backbone = RTDetrResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    options = {
        "freeze_backbone_batch_norms": False,
        "encoder_hidden_dim": 48,
        "encoder_in_channels": [32, 48, 64],
        "encoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "hidden_expansion": 0.5,
        "d_model": 48,
        "num_queries": 20,
        "num_denoising": 20,
        "decoder_in_channels": [48, 48, 48],
        "decoder_ffn_dim": 96,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
    }
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **{**options, **NAMES, **changes}))


def yolos() -> YolosForObjectDetection:
    """0.2 million parameters: 64 patches and 8 detection tokens."""
    config = YolosConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        patch_size=12,
        num_detection_tokens=8,
        use_mid_position_embeddings=False,
        initializer_range=0.1,
        **NAMES,
    )
    model = YolosForObjectDetection(config)
    _tell_positions_apart(model.vit.embeddings.position_embeddings, config)
    return model


@torch.no_grad()
def _tell_positions_apart(embeddings: nn.Parameter, config: YolosConfig) -> None:
    """Sines and cosines of row and column for patches, random numbers for detection tokens: they begin as zeros.

    Source: Vaswani et al., "Attention is all you need", 2017, 3.5, once for each axis.
    """
    patches, quarter = config.image_size[0] // config.patch_size, config.hidden_size // 4
    rates = 100.0 ** (-torch.arange(quarter) / quarter)
    places = torch.stack(torch.meshgrid(*[torch.arange(patches)] * 2, indexing="ij"), -1).reshape(-1, 2, 1)
    angles = places * rates
    embeddings[0, 1 : 1 + patches**2] = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    embeddings[0, 1 + patches**2 :].normal_(std=0.7)


DETECTORS = {
    "RT-DETR": Detector(
        rt_detr,
        RTDetrImageProcessorPil(size=SIZE),
        2400,
        1200,
        {"learning_rate": 1e-3, "max_grad_norm": 0.1, "per_device_train_batch_size": 16},
    ),
    "YOLOS": Detector(
        yolos,
        YolosImageProcessorPil(size=SIZE, do_pad=False),
        6000,
        8000,
        {"learning_rate": 1e-3, "per_device_train_batch_size": 32},
        qat_steps=600,
        qat_share=1 / 5,
        begin=lambda model, rows, steps: train_patches(model, rows, -(-steps // 4)),
    ),
}


def encoded(processor: Any, images: int, seed: int) -> list[dict[str, Any]]:
    """Shapes on clutter, as rows that a model takes."""
    columns = shapes_dataset(images, seed)[:]
    batch = detection.encode(processor, columns["image"], columns["objects"])
    return [{"pixel_values": x, "labels": y} for x, y in zip(batch["pixel_values"], batch["labels"], strict=True)]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    """What all trainings have in common, and `options`."""
    return TrainingArguments(
        str(directory),
        lr_scheduler_type="cosine",
        per_device_eval_batch_size=50,
        eval_do_concat_batches=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=100,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def trainer_arguments(processor: Any, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, Any]:
    """What Trainer and QATTrainer take alike."""
    return {
        "train_dataset": train,
        "eval_dataset": test,
        "data_collator": detection.collate,
        "compute_metrics": partial(detection.metrics, processor),
        "preprocess_logits_for_metrics": detection.scores_and_boxes,
    }


def runtime(file: Path, optimized: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Pixels (1, 3, H, W) → logits and boxes, by ONNX Runtime with its default optimizations or none."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": pixels.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return run


def on_runtime(file: Path, processor: Any, test: list[dict[str, Any]], optimized: bool) -> dict[str, float]:
    """Metrics of a file, image by image."""
    run = runtime(file, optimized)
    outputs = [run(row["pixel_values"][None]) for row in test]
    return detection.metrics(
        processor, SimpleNamespace(predictions=outputs, label_ids=[[row["labels"]] for row in test])
    )
