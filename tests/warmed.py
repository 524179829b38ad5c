"""Importing this imports what a capture imports when it begins: for a process of which others are forked."""

import torch
from torch import nn

import hf_qat.trainer.trainer  # noqa: F401
from hf_qat.model.prepare import prepare_qat


prepare_qat(nn.Linear(2, 2), None, torch.zeros(2, 2))
