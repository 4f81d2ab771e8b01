"""What tells one model from another."""

from __future__ import annotations

import hashlib

from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory
from dmt.models.architectures import architecture_of


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's blocks' function and of all its weights, wherever it lies; stored rows are none of them."""
    architecture = architecture_of(model.config.model_type)
    digest = hashlib.sha256(f"{model.config.model_type} {getattr(model.config, architecture.activation)}".encode())
    stored = tuple(f"{name}.rows." for name, part in model.named_modules() if isinstance(part, AssociativeMemory))
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(stored):
            continue
        digest.update(f" {name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
