"""Students as transformers models, which the Auto classes save, load and generate from.

Also memory tokens: embeddings that stand before every text and belong to no word. A model reads
them and never generates them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from dmt.errors import UserError
from dmt.files import STUDENT_VERSION, check_version
from dmt.memory.base import MemoryLayer
from dmt.memory.registry import get_memory_class
from dmt.models import external_tensors
from dmt.models.adapters import register_target_modules
from dmt.models.architectures import ARCHITECTURES, Architecture, get_architecture
from dmt.models.fact_files import FACTS_FILE, copy_facts, load_facts
from dmt.models.hub_files import get_auto_map, write_hub_files
from dmt.models.token_hooks import register_token_hooks
from dmt.ops import use_onednn_linear

logger = logging.getLogger(__name__)


class MemoryTokenEmbedding(nn.Embedding):
    """A model's embeddings, which the head may share, and more of memory tokens that it does not.

    Args:
        vocab_size: rows of the shared table `(vocab_size, width)`.
        width: size of an embedding.
        count: memory tokens; `memory` is `(count, width)`.
        first: token id of the first of them, at least as large as that of any word.
    """

    def __init__(self, vocab_size: int, width: int, count: int, first: int) -> None:
        super().__init__(vocab_size, width)
        self.first = first
        self.memory = nn.Parameter(torch.empty(count, width).normal_(std=0.02))

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids `(...)` to embeddings `(..., width)`."""
        memory_ids = ids - self.first
        embeddings = super().forward(ids.clamp_max(min(self.first, self.num_embeddings) - 1))
        return torch.where(
            (memory_ids >= 0).unsqueeze(-1),
            self.memory[memory_ids.clamp_min(0)].to(embeddings.dtype),
            embeddings,
        )

    def extra_repr(self) -> str:
        """Return what `repr` shows of the module."""
        return f"{super().extra_repr()}, memory={len(self.memory)}"


def get_memory_tokens(model: PreTrainedModel) -> MemoryTokenEmbedding | None:
    """Return a model's memory tokens, None where it has none."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, MemoryTokenEmbedding) else None


@torch.no_grad()
def init_memory_tokens(model: PreTrainedModel, token_ids: Tensor) -> None:
    """Set memory tokens to the embeddings of token ids `(n,)`, repeated as often as needed."""
    embedding = get_memory_tokens(model)
    assert embedding is not None, "the model has memory tokens"
    embedding.memory.copy_(
        embedding.weight[
            token_ids.repeat(-(-len(embedding.memory) // len(token_ids)))[: len(embedding.memory)]
        ]
    )


# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)


def _get_memory_class(kind: str, layer: str) -> type[MemoryLayer]:
    try:
        return get_memory_class(kind)
    except UserError as error:
        raise UserError(
            f"this student's memory of layer {layer} is of kind {kind}: {error}"
        ) from None


def _find_file(name_or_path: Any, file_name: str, kwargs: dict[str, Any]) -> Path | None:
    """Return a file of a saved model, which may be a folder or a name on a hub; None without it."""
    hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    file = cached_file(
        str(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    return None if file is None else Path(file)


class _MemoryModelMixin(PreTrainedModel):
    # Of the backbone and of every head: loading asks the one that holds a module how to initialize
    # it.

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryLayer):
            module.reset()
            return
        super()._init_weights(module)
        if isinstance(module, MemoryTokenEmbedding):
            module.memory.normal_(std=0.02)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a student, with slots of a file of their own, stored rows and facts."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in model.base_model.frozen_names:  # transformers gives all it loads a gradient
            model.base_model.get_parameter(name).requires_grad_(False)
        if model.config.external_tensors:
            file = _find_file(pretrained_model_name_or_path, external_tensors.SLOTS_FILE, kwargs)
            external_tensors.attach_model_file(
                model,
                file or Path(str(pretrained_model_name_or_path)) / external_tensors.SLOTS_FILE,
                model.config.external_tensors,
            )
        if facts_path := _find_file(pretrained_model_name_or_path, FACTS_FILE, kwargs):
            if model.can_generate():
                load_facts(model, facts_path)
            else:
                logger.warning(
                    "%s is not loaded: facts and rows written after training belong to the "
                    "language model, and this is a %s",
                    facts_path,
                    type(model).__name__,
                )
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save a student, with slots in a file of their own, stored rows and facts.

        Args:
            save_directory: the folder.
            args: of transformers.
            kwargs: of transformers; and `fact_history=True` to save deleted facts too.
        """
        with_history = kwargs.pop("fact_history", False)
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
        classes = STUDENT_CLASSES[self.config.model_type.removeprefix("dmt_")]
        self.config.auto_map = get_auto_map(classes)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.external_tensors = slots_digest  # tensors in RAM do not need the file
        if kwargs.get("is_main_process", True):
            copy_facts(
                self, Path(str(save_directory)), kwargs.get("state_dict"), with_history=with_history
            )
        write_hub_files(Path(str(save_directory)), self.config, classes)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: saved folders name the installed package, no copy of its code."""


# Config and models of students by the family of the teacher, then by the name of their Auto class.
STUDENT_CLASSES: dict[str, dict[str, Any]] = {}
# Where transformers lists the classes of each family by name.
CLASS_NAMES: dict[str, dict[str, Any]] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def register_architecture(family: str, architecture: Architecture) -> None:
    """Support a family of models: its students can be made, saved and loaded.

    The backbone of a student and the heads that transformers has for the family (classification
    of sequences and tokens, question answering) are registered with the Auto classes too.

    ```python
    register_architecture("mistral", replace(ARCHITECTURES["llama"], classes=(
        "MistralConfig", "MistralModel", "MistralForCausalLM")))
    ```

    Args:
        family: the `model_type` of transformers.
        architecture: where the feed-forward blocks are.

    Raises:
        UserError: the family is supported already, or transformers lacks its classes.
    """
    if family in STUDENT_CLASSES:
        raise UserError(f"family={family} is supported already")
    missing = [name for name in architecture.classes if not hasattr(transformers, name)]
    if missing:
        raise UserError(f"transformers {transformers.__version__} has no {', '.join(missing)}")
    classes = _make_student_classes(family, architecture)
    config_class = classes["AutoConfig"]
    ARCHITECTURES[family] = architecture
    STUDENT_CLASSES[family] = classes
    AutoConfig.register(config_class.model_type, config_class)
    for auto_name, cls in classes.items():
        globals()[cls.__name__] = cls
        # Clients look classes up by name too: Trainer shifts the labels of those in the table of
        # language models only; TRL and `transformers serve` ask transformers itself.
        setattr(transformers, cls.__name__, cls)
        if auto_name in CLASS_NAMES:
            getattr(transformers, auto_name).register(config_class, cls)
            CLASS_NAMES[auto_name][config_class.model_type] = cls.__name__
    register_target_modules()


def _make_student_classes(family: str, architecture: Architecture) -> dict[str, Any]:
    """Make `MemoryGPT2Config`, `MemoryGPT2LMHeadModel` and so on, by the name of the Auto class."""
    config_base, backbone_base, model_base = (
        getattr(transformers, name) for name in architecture.classes
    )

    class StudentConfig(config_base):  # type: ignore[valid-type,misc]
        # `memory` maps a layer number (a string, JSON has no other keys) to the `kind` of its
        # memory and the arguments of `MemoryLayer.from_arguments`. `external_tensors` is the
        # digest of the file beside the weights that holds slots, where there is one.
        # `memory_tokens` are `count` and `first` of a `MemoryTokenEmbedding`.
        model_type = f"dmt_{family}"
        # Memories are not split among devices.
        base_model_tp_plan = {
            name: style
            for name, style in (config_base.base_model_tp_plan or {}).items()
            if architecture.block not in name.split(".")
        } or None
        dmt: int = STUDENT_VERSION
        memory: dict | None = None
        external_tensors: str | None = None
        memory_tokens: dict | None = None

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Build the config; one that states no version is of version 1."""
            return super().from_dict({"dmt": 1} | config_dict, **kwargs)

        @classmethod
        def register_for_auto_class(cls, auto_class: Any = None) -> None:
            """Do nothing: saved folders name the installed package, no copy of its code."""

    class StudentBackbone(_MemoryModelMixin, backbone_base):  # type: ignore[valid-type,misc]
        config_class = StudentConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            _install_memories(self, architecture)
            self.post_init()

    class StudentModel(_MemoryModelMixin, model_base, GenerationMixin):  # type: ignore[valid-type,misc]
        config_class = StudentConfig

        def __init__(self, config: Any) -> None:
            PreTrainedModel.__init__(self, config)
            # Drawn before the memories, so that a seed gives the same memories as ever.
            lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            setattr(self, architecture.backbone, StudentBackbone(config))
            self.vocab_size = config.vocab_size
            self.lm_head = use_onednn_linear(lm_head)
            self.post_init()

    classes = {
        "AutoConfig": _name_class(StudentConfig, config_base),
        "AutoModel": _name_class(StudentBackbone, backbone_base),
        "AutoModelForCausalLM": _name_class(StudentModel, model_base),
    }
    for auto_name, class_names in CLASS_NAMES.items():
        if auto_name not in classes and family in class_names:
            head_base = getattr(transformers, class_names[family])
            classes[auto_name] = _make_head_class(
                head_base, StudentConfig, StudentBackbone, architecture.backbone
            )
    return classes


def _name_class(cls: Any, base: type) -> Any:
    cls.__name__ = cls.__qualname__ = f"Memory{base.__name__}"
    cls.__doc__ = f"`{base.__name__}` of a student, with memories."
    return cls


def _make_head_class(
    head_base: Any, config: type, backbone: type[PreTrainedModel], backbone_name: str
) -> Any:
    """Make a class with the head of `head_base` on a student's backbone."""

    class StudentHead(_MemoryModelMixin, head_base):  # type: ignore[valid-type,misc]
        config_class = config
        # LlamaForQuestionAnswering has another, and so takes no weights of a language model.
        base_model_prefix = backbone_name

        def __init__(self, config: Any) -> None:
            # The dense backbone that the base may build takes this out of the config.
            has_checkpointing = getattr(config, "gradient_checkpointing", False)
            super().__init__(config)
            if not isinstance(self.base_model, backbone):
                setattr(self, self.base_model_prefix, backbone(config))
                self.post_init()
                if has_checkpointing:
                    self.activation_checkpointing_enable()

    return _name_class(StudentHead, head_base)


def _install_memories(backbone: Any, architecture: Architecture) -> None:
    """Replace feed-forward blocks of a backbone by the memories that its config names."""
    config = backbone.config
    check_version(
        config.dmt,
        STUDENT_VERSION,
        "this student is of version",
        "distill it again, or use the dmt that made it",
    )
    for layer, arguments in (config.memory or {}).items():
        memory_class = _get_memory_class(str(arguments.get("kind")), layer)
        memory_arguments = {name: arguments[name] for name in arguments if name != "kind"}
        memory = memory_class.from_arguments(
            config.hidden_size, architecture.gated, memory_arguments
        )
        architecture.replace_block(backbone, int(layer), memory)
    backbone.frozen_names = tuple(
        name for name, parameter in backbone.named_parameters() if not parameter.requires_grad
    )
    register_token_hooks(backbone, architecture)
    if config.memory_tokens:
        backbone.set_input_embeddings(
            MemoryTokenEmbedding(config.vocab_size, config.hidden_size, **config.memory_tokens)
        )
    if config.external_tensors:
        external_tensors.release_model_tensors(backbone)
    use_onednn_linear(backbone)


def build_student(
    teacher_config: Any, memory: dict[str, dict[str, Any]], no_dropout: dict[str, float]
) -> PreTrainedModel:
    """Return a student of the teacher's shape with fresh weights.

    Args:
        teacher_config: the teacher's config.
        memory: for each layer with a memory, its `kind` and arguments.
        no_dropout: config values that switch every dropout off.
    """
    classes = STUDENT_CLASSES[teacher_config.model_type.removeprefix("dmt_")]
    excluded = ("model_type", "architectures", "memory", "dtype", "external_tensors", "dmt")
    settings = {
        name: value for name, value in teacher_config.to_dict().items() if name not in excluded
    }
    config = classes["AutoConfig"](**{**settings, **no_dropout}, memory=memory)
    return classes["AutoModelForCausalLM"](config)


for _family, _architecture in ARCHITECTURES.items():
    register_architecture(_family, _architecture)
