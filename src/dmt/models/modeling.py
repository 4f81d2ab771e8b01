"""Students as transformers models: `import dmt`, then the Auto classes save, load and generate them as any other.

Memory tokens: embeddings that stand before every text and are no words. A model reads them and never says them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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

from dmt.errors import UserError
from dmt.files import STUDENT_VERSION, check_version
from dmt.memory.base import MemoryLayer
from dmt.memory.registry import get_memory_class
from dmt.models import external_tensors
from dmt.models.architectures import get_architecture
from dmt.models.fact_hooks import FACTS_FILE, copy_facts, load_facts
from dmt.models.hub_files import get_auto_map, write_hub_files
from dmt.ops import use_onednn_linear


class MemoryTokenEmbedding(nn.Embedding):
    """A model's table of embeddings, whose rows the head may share, and `count` more that it does not.

    Args:
        vocabulary, width: of the table `(vocabulary, width)`.
        count: memory tokens, `memory` `(count, width)`.
        first: token id of the first of them, at least as large as that of any word.
    """

    def __init__(self, vocab_size: int, width: int, count: int, first: int) -> None:
        super().__init__(vocab_size, width)
        self.first = first
        self.memory = nn.Parameter(torch.empty(count, width).normal_(std=0.02))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `(...)` to `(..., width)`."""
        memory_ids = ids - self.first
        embeddings = super().forward(ids.clamp_max(min(self.first, self.num_embeddings) - 1))
        return torch.where(
            (memory_ids >= 0).unsqueeze(-1),
            self.memory[memory_ids.clamp_min(0)].to(embeddings.dtype),
            embeddings,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, memory={len(self.memory)}"


def get_memory_tokens(model: PreTrainedModel) -> MemoryTokenEmbedding | None:
    """A model's memory tokens, where it has any."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, MemoryTokenEmbedding) else None


@torch.no_grad()
def init_memory_tokens(model: PreTrainedModel, token_ids: Tensor) -> None:
    """Let memory tokens begin as the embeddings of words with these ids `(n,)`, repeated as often as needed."""
    embedding = get_memory_tokens(model)
    assert embedding is not None, "the model has memory tokens"
    embedding.memory.copy_(
        embedding.weight[
            token_ids.repeat(-(-len(embedding.memory) // len(token_ids)))[: len(embedding.memory)]
        ]
    )


HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
"""What `from_pretrained` is told about where files come from."""


class MemoryGPT2Config(GPT2Config):
    """A GPT-2's config and, for each layer that has a memory, the arguments that build it.

    `memory` maps a layer number (as a string, JSON has no other keys) to arguments of its `FeaturalMemory`; or to `rows`,
    arguments of an `AssociativeMemory`, and `base`, those of its base or None. `slots` is the digest of the file beside the
    weights that holds slots which are not among them (`models/slots.py`), where there is one. `memory_tokens` are `count` and
    `first` of `models/tokens.py`, where there are any. `dmt` is the version of all this.
    """

    model_type = "dmt_gpt2"
    dmt: int = STUDENT_VERSION
    memory: dict | None = None
    external_tensors: str | None = None
    memory_tokens: dict | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: saved folders name the installed package, no copy of its code."""


class MemoryLlamaConfig(LlamaConfig):
    """A Llama's config and its memories, as in `MemoryGPT2Config`."""

    model_type = "dmt_llama"
    dmt: int = STUDENT_VERSION
    memory: dict | None = None
    external_tensors: str | None = None
    memory_tokens: dict | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: saved folders name the installed package, no copy of its code."""


def _get_memory_class(kind: str, layer: str) -> type[MemoryLayer]:
    try:
        return get_memory_class(kind)
    except UserError as error:
        raise UserError(
            f"this student's memory of layer {layer} is of kind {kind}: {error}"
        ) from None


class _MemoryModelMixin(PreTrainedModel):
    # On the inner and the outer model alike: loading asks the one that holds a module how to initialise it.

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryLayer):
            module.reset()
            return
        super()._init_weights(module)
        if isinstance(module, MemoryTokenEmbedding):
            module.memory.normal_(std=0.02)

    def install_memories(self) -> None:
        """Put the memories that the config names where the feed-forward blocks are."""
        config: Any = self.config
        check_version(
            config.dmt,
            STUDENT_VERSION,
            "this student is of version",
            "distil it anew, or use the dmt that made it",
        )
        arch = get_architecture(config.model_type)
        for layer, arguments in (config.memory or {}).items():
            memory_class = _get_memory_class(arguments["kind"], layer)
            memory_arguments = {name: arguments[name] for name in arguments if name != "kind"}
            memory = memory_class.from_arguments(config.hidden_size, arch.gated, memory_arguments)
            arch.replace_block(self, int(layer), memory)
        if config.memory_tokens:
            self.set_input_embeddings(
                MemoryTokenEmbedding(config.vocab_size, config.hidden_size, **config.memory_tokens)
            )
        if config.external_tensors:
            external_tensors.release_model_tensors(self)
        use_onednn_linear(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As ever; slots in a file of their own, and what a book beside the weights says, facts and rows, are there too."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.external_tensors:
            hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            file = cached_file(
                str(pretrained_model_name_or_path),
                external_tensors.SLOTS_FILE,
                _raise_exceptions_for_missing_entries=False,
                **hub_kwargs,
            )
            external_tensors.attach_model_file(
                model,
                Path(
                    file or Path(str(pretrained_model_name_or_path)) / external_tensors.SLOTS_FILE
                ),
                model.config.external_tensors,
            )
        if (facts_path := Path(str(pretrained_model_name_or_path)) / FACTS_FILE).is_file():
            load_facts(model, facts_path)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As ever; slots in a file of their own, stored rows and facts go along, and the config says what there is of them."""
        for layer, block in enumerate(get_architecture(self.config.model_type).blocks(self)):
            if isinstance(block, MemoryLayer):
                arguments = self.config.memory[str(layer)]
                self.config.memory[str(layer)] = block.saved_arguments(arguments)
        slots_digest, self._keys_to_ignore_on_save = (
            self.config.external_tensors,
            external_tensors.external_tensor_names(self),
        )
        self.config.external_tensors = external_tensors.save_model_tensors(
            self, Path(str(save_directory))
        )
        self.config.auto_map = get_auto_map(type(self.config), type(self))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.external_tensors = slots_digest  # what is in RAM goes on without the file
        copy_facts(self, Path(str(save_directory)))
        write_hub_files(Path(str(save_directory)), self.config, type(self))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: saved folders name the installed package, no copy of its code."""


class MemoryGPT2Model(_MemoryModelMixin, GPT2Model):
    """The backbone of a student made from a GPT-2."""

    config_class = MemoryGPT2Config


class MemoryGPT2LMHeadModel(_MemoryModelMixin, GPT2LMHeadModel):
    """A GPT-2 with memories in the layers its config names; what `AutoModelForCausalLM` gives for a saved student."""

    config_class = MemoryGPT2Config

    def __init__(self, config: MemoryGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = MemoryGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.install_memories()
        self.post_init()


class MemoryLlamaModel(_MemoryModelMixin, LlamaModel):
    """The backbone of a student made from a Llama."""

    config_class = MemoryLlamaConfig


class MemoryLlamaForCausalLM(_MemoryModelMixin, LlamaForCausalLM):
    """A Llama with memories in the layers its config names."""

    config_class = MemoryLlamaConfig

    def __init__(self, config: MemoryLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MemoryLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.install_memories()
        self.post_init()


STUDENT_CLASSES: dict[str, tuple[Any, Any]] = {
    "gpt2": (MemoryGPT2Config, MemoryGPT2LMHeadModel),
    "llama": (MemoryLlamaConfig, MemoryLlamaForCausalLM),
}
"""Config and model of a student by the teacher's `model_type`."""

for _config_class, _model_class in STUDENT_CLASSES.values():
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModelForCausalLM.register(_config_class, _model_class)


def build_student(
    teacher_config: Any, memory: dict[str, dict[str, Any]], no_dropout: dict[str, float]
) -> PreTrainedModel:
    """A student of the teacher's shape with fresh weights; `memory` as in `MemoryGPT2Config`."""
    config_class, model_class = STUDENT_CLASSES[teacher_config.model_type.removeprefix("dmt_")]
    excluded = ("model_type", "architectures", "memory", "dtype", "external_tensors", "dmt")
    settings = {
        name: value for name, value in teacher_config.to_dict().items() if name not in excluded
    }
    return model_class(config_class(**{**settings, **no_dropout}, memory=memory))
