"""Students as transformers models: `import dmt`, then the Auto classes save, load and generate them as any other."""

from __future__ import annotations

from pathlib import Path
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
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)
from transformers.utils import cached_file

from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.admission import Policy
from dmt.models import slots
from dmt.models.architectures import architecture_of
from dmt.models.books import BOOK, attach, carry
from dmt.models.quick import quicken
from dmt.models.tokens import MemoryTokens
from dmt.versions import STUDENT, check_version

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""What `from_pretrained` is told about where files come from."""


class MemoryGPT2Config(GPT2Config):
    """A GPT-2's config and, for each layer that has a memory, the arguments that build it.

    `memory` maps a layer number (as a string, JSON has no other keys) to arguments of its `FeaturalMemory`; or to `rows`,
    arguments of an `AssociativeMemory`, and `base`, those of its base or None. `slots` is the digest of the file beside the
    weights that holds slots which are not among them (`models/slots.py`), where there is one. `memory_tokens` are `count` and
    `first` of `models/tokens.py`, where there are any. `dmt` is the version of all this.
    """

    model_type = "dmt_gpt2"
    dmt: int = STUDENT
    memory: dict | None = None
    slots: str | None = None
    memory_tokens: dict | None = None


class MemoryLlamaConfig(LlamaConfig):
    """A Llama's config and its memories, as in `MemoryGPT2Config`."""

    model_type = "dmt_llama"
    dmt: int = STUDENT
    memory: dict | None = None
    slots: str | None = None
    memory_tokens: dict | None = None


class _WithMemories(PreTrainedModel):
    # On the inner and the outer model alike: loading asks the one that holds a module how to initialise it.

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeaturalMemory | AssociativeMemory):
            module.reset()
            return
        super()._init_weights(module)
        if isinstance(module, MemoryTokens):
            module.memory.normal_(std=0.02)

    def plant(self) -> None:
        """Put the memories that the config names where the feed-forward blocks are."""
        config: Any = self.config
        check_version(config.dmt, STUDENT, "this student is of version", "distil it anew, or use the dmt that made it")
        arch = architecture_of(config.model_type)
        for layer, arguments in (config.memory or {}).items():
            arch.replace(self, int(layer), _memory(config.hidden_size, arch.gated, arguments))
        if config.memory_tokens:
            self.set_input_embeddings(MemoryTokens(config.vocab_size, config.hidden_size, **config.memory_tokens))
        if config.slots:
            slots.leave(self)
        quicken(self)

    @classmethod
    def from_pretrained(cls, place: Any, *given: Any, **named: Any) -> Any:  # type: ignore[override]
        """As ever; slots in a file of their own, and what a book beside the weights says, facts and rows, are there too."""
        loaded = super().from_pretrained(place, *given, **named)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.slots:
            how = {name: named[name] for name in HUB if name in named}
            file = cached_file(str(place), slots.SLOTS, _raise_exceptions_for_missing_entries=False, **how)
            slots.take(model, Path(file or Path(str(place)) / slots.SLOTS), model.config.slots)
        if (book := Path(str(place)) / BOOK).is_file():
            attach(model, book)
        return loaded

    def save_pretrained(self, place: Any, *given: Any, **named: Any) -> None:  # type: ignore[override]
        """As ever; slots in a file of their own, stored rows and facts go along, and the config says what there is of them."""
        for layer, block in enumerate(architecture_of(self.config.model_type).blocks(self)):
            if isinstance(block, AssociativeMemory):
                self.config.memory[str(layer)]["rows"]["places"] = block.rows.places
        before, self._keys_to_ignore_on_save = self.config.slots, slots.away(self)
        self.config.slots = slots.put(self, Path(str(place)))
        try:
            super().save_pretrained(place, *given, **named)
        finally:
            self.config.slots = before  # what is in RAM goes on without the file
        carry(self, Path(str(place)))


def _memory(width: int, gated: bool, arguments: dict[str, Any]) -> nn.Module:
    """The memory that these arguments of a config describe."""
    if "rows" not in arguments:
        return FeaturalMemory(width=width, gated=gated, **arguments)
    rows = dict(arguments["rows"])
    base = None if arguments["base"] is None else FeaturalMemory(width=width, gated=gated, **arguments["base"])
    return AssociativeMemory(width, base=base, policy=Policy(**rows.pop("policy")), **rows)


class MemoryGPT2Model(_WithMemories, GPT2Model):
    """The backbone of a student made from a GPT-2."""

    config_class = MemoryGPT2Config


class MemoryGPT2LMHeadModel(_WithMemories, GPT2LMHeadModel):
    """A GPT-2 with memories in the layers its config names; what `AutoModelForCausalLM` gives for a saved student."""

    config_class = MemoryGPT2Config

    def __init__(self, config: MemoryGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = MemoryGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.plant()
        self.post_init()


class MemoryLlamaModel(_WithMemories, LlamaModel):
    """The backbone of a student made from a Llama."""

    config_class = MemoryLlamaConfig


class MemoryLlamaForCausalLM(_WithMemories, LlamaForCausalLM):
    """A Llama with memories in the layers its config names."""

    config_class = MemoryLlamaConfig

    def __init__(self, config: MemoryLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MemoryLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.plant()
        self.post_init()


STUDENTS: dict[str, tuple[Any, Any]] = {
    "gpt2": (MemoryGPT2Config, MemoryGPT2LMHeadModel),
    "llama": (MemoryLlamaConfig, MemoryLlamaForCausalLM),
}
"""Config and model of a student by the teacher's `model_type`."""

for _config, _model in STUDENTS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)


def build_student(teacher_config: Any, memory: dict[str, dict[str, Any]], no_dropout: dict[str, float]) -> PreTrainedModel:
    """A student of the teacher's shape with fresh weights; `memory` as in `MemoryGPT2Config`."""
    config, model = STUDENTS[teacher_config.model_type.removeprefix("dmt_")]
    left = ("model_type", "architectures", "memory", "dtype", "slots", "dmt")
    settings = {name: value for name, value in teacher_config.to_dict().items() if name not in left}
    return model(config(**{**settings, **no_dropout}, memory=memory))
