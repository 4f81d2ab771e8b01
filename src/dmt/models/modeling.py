"""The student as a transformers model: `import dmt`, then the Auto classes save, load and generate it as any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    PreTrainedModel,
)

from dmt.memory import FeaturalMemory
from dmt.models.architectures import ARCHITECTURES


class MemoryGPT2Config(GPT2Config):
    """A GPT-2's config and, for each layer that has a memory, the arguments that build it.

    `memory` maps a layer number (as a string, JSON has no other keys) to `FeaturalMemory` arguments.
    """

    model_type = "dmt_gpt2"
    memory: dict | None = None


class _WithMemories(GPT2PreTrainedModel):
    # On the inner and the outer model alike: loading asks the one that holds a module how to initialise it.
    config_class = MemoryGPT2Config

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeaturalMemory):
            module.reset()
        else:
            super()._init_weights(module)


class MemoryGPT2Model(_WithMemories, GPT2Model):
    """The backbone of a student."""


class MemoryGPT2LMHeadModel(_WithMemories, GPT2LMHeadModel):
    """A GPT-2 with memories in the layers its config names; what `AutoModelForCausalLM` gives for a saved student."""

    def __init__(self, config: MemoryGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = MemoryGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for layer, arguments in (config.memory or {}).items():
            ARCHITECTURES["gpt2"].replace(self, int(layer), FeaturalMemory(width=config.n_embd, **arguments))
        self.post_init()


AutoConfig.register("dmt_gpt2", MemoryGPT2Config)
AutoModelForCausalLM.register(MemoryGPT2Config, MemoryGPT2LMHeadModel)


def build_student(teacher_config: Any, memory: dict[str, dict[str, Any]], no_dropout: dict[str, float]) -> PreTrainedModel:
    """A student of the teacher's shape with fresh weights; `memory` as in `MemoryGPT2Config`."""
    settings = {k: v for k, v in teacher_config.to_dict().items() if k not in ("model_type", "architectures", "memory", "dtype")}
    return MemoryGPT2LMHeadModel(MemoryGPT2Config(**{**settings, **no_dropout}, memory=memory))
