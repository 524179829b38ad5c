"""A first training for YOLOS, whose detection tokens learn little from patches that mean nothing yet.

Its paper begins with a transformer that was trained on ImageNet (Fang et al., "You only look at one sequence", 2021,
3.2). Here each patch learns what covers its middle, and the box of that: in a minute, from the images of the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import YolosForObjectDetection


BATCH = 32

#: Share of the steps in which the learning rate rises.
WARMUP = 0.1

LEARNING_RATE = 1.5e-3

#: Of the boxes in the loss.
BOX_WEIGHT = 2.0


def train_patches(model: YolosForObjectDetection, rows: Sequence[dict[str, Any]], steps: int) -> None:
    """Train the transformer of a YOLOS in place, by a linear layer on its patches that is thrown away.

    Args:
        model: in float.
        rows: `pixel_values` (3, H, W), and `labels` with `class_labels` and `boxes`.
        steps: with batches of 32.
    """
    config = model.config
    grid, nothing = config.image_size[0] // config.patch_size, config.num_labels
    pixels = torch.stack([row["pixel_values"] for row in rows])
    targets = [_targets(row["labels"], grid, nothing) for row in rows]
    kinds, boxes = (torch.stack(part) for part in zip(*targets, strict=True))
    head = nn.Linear(config.hidden_size, nothing + 1 + 4)
    optimizer = torch.optim.AdamW([*model.vit.parameters(), *head.parameters()], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=WARMUP)
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(rows), (BATCH,))
        patches = model.vit(pixels[drawn]).last_hidden_state[:, 1 : 1 + grid**2]
        scores, corners = head(patches).split([nothing + 1, 4], -1)
        there = kinds[drawn] != nothing
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), kinds[drawn].flatten())
        loss = loss + BOX_WEIGHT * (corners.sigmoid() - boxes[drawn])[there].abs().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.vit.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _targets(labels: dict[str, Tensor], grid: int, nothing: int) -> tuple[Tensor, Tensor]:
    """For each patch the class of the object that covers its middle, and its box."""
    middles = (torch.arange(grid) + 0.5) / grid
    places = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1).reshape(-1, 2)
    kinds, boxes = torch.full((grid**2,), nothing), torch.zeros(grid**2, 4)
    for kind, box in zip(labels["class_labels"], labels["boxes"], strict=True):
        inside = ((places - box[:2]).abs() < box[2:] / 2).all(-1)
        kinds[inside], boxes[inside] = kind, box
    return kinds, boxes
