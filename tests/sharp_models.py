"""Tiny models with opinions: weights drawn so wide that the next tokens differ clearly."""

from pathlib import Path

import torch
from transformers import PreTrainedModel


def save_sharp(model: PreTrainedModel, folder: Path) -> str:
    """Draw the matrices of a model anew, save it, and return where."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return str(folder)
