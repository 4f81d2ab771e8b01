"""Where a context goes: which parameters of a student are trained, and how they are saved."""

from __future__ import annotations

from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dmt.config import Config, ContextConfig, DenseConfig
from dmt.data.tokenizer import MEMORY_TOKEN_FORMAT, get_prefix_ids, prepend_prefix
from dmt.errors import UserError
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import detach
from dmt.models.forward import encode_text
from dmt.models.loading import SAFE_LOADING
from dmt.models.memories import get_featural_memories
from dmt.models.modeling import MemoryTokenEmbedding, get_memory_tokens, init_memory_tokens


def make_student(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` without facts; a plain model becomes a student without memories."""
    if not model.config.model_type.startswith("dmt_"):
        return convert_blocks(model, [DenseConfig()] * model.config.num_hidden_layers)[0]
    with TemporaryDirectory() as folder:  # rows of memories are more than tensors
        model.save_pretrained(folder)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SAFE_LOADING)
    detach(student)
    return student.eval()


def check_target(settings: ContextConfig, model: PreTrainedModel) -> None:
    """Raise `UserError` if the model lacks what `context.target` trains."""
    if settings.target == "memory":
        return
    if getattr(model.config, "external_tensors", None):
        raise UserError(
            f"context.target={settings.target} trains the student, whose slots are memory-mapped; "
            "distill it with memory.offload=none, or set context.target=memory"
        )
    if settings.target == "prompt" and get_memory_tokens(model) is not None:
        raise UserError(
            "this model has memory tokens already; use the model that it was made from, or set "
            "context.target=memory"
        )
    if (
        settings.target == "weights"
        and settings.trainable == "slots"
        and not get_featural_memories(model)
    ):
        raise UserError(
            "context.trainable=slots trains featural memories, and this model has none; name a "
            "distilled student (teacher=lightning_logs/version_0/student), or set "
            "context.trainable=lora"
        )
    if settings.target == "weights" and settings.trainable == "lora" and find_spec("peft") is None:
        raise UserError(
            "context.trainable=lora needs peft: pip install peft, or set context.trainable=all"
        )


def prepare_student(
    config: Config, student: PreTrainedModel, tokenizer: Any, text: str
) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """Return the student and its trainable parameters by name; nothing else has a gradient."""
    settings = config.context
    student.requires_grad_(False)
    if settings.target == "prompt":
        student = _add_soft_prompt(student, tokenizer, settings.prompt_length, text)
        trainable = {"memory_tokens": get_memory_tokens(student).memory}  # type: ignore[union-attr]
    elif settings.trainable == "lora":
        trainable = _inject_lora(student, settings.lora_rank)
    elif settings.trainable == "slots":
        trainable = {
            f"layer_{layer}.{name}": parameter
            for layer, memory in get_featural_memories(student).items()
            for name, parameter in memory.named_parameters()
        }
    else:
        trainable = dict(student.named_parameters())
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return student, trainable


def merge_adapters(student: PreTrainedModel) -> PreTrainedModel:
    """Return the student as it is saved: LoRA adapters are merged into the weights."""
    for name, module in list(student.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, module.get_base_layer())
    return student.requires_grad_(False).eval()


def _inject_lora(student: PreTrainedModel, rank: int) -> dict[str, nn.Parameter]:
    """Add LoRA adapters to every matrix of the transformer blocks; return their parameters.

    Source: Hu et al. 2021, arXiv 2106.09685, as implemented by peft.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    arch = get_architecture(student.config.model_type)
    block = arch.transformer_blocks(student)
    module_names = sorted(
        {name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    )
    target_modules = [f"{arch.layers}.{name}" for name in module_names]
    fan_in_fan_out = any(isinstance(module, Conv1D) for module in block.modules())
    with catch_warnings():  # peft warns about each transposed matrix
        filterwarnings("ignore", message="fan_in_fan_out is set to True")
        inject_adapter_in_model(
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=target_modules,
                fan_in_fan_out=fan_in_fan_out,
            ),
            student,
        )
    return {name: parameter for name, parameter in student.named_parameters() if "lora_" in name}


def _add_soft_prompt(
    student: PreTrainedModel, tokenizer: Any, num_tokens: int, text: str
) -> PreTrainedModel:
    """Add memory tokens to student and tokenizer; they start as embeddings of the first tokens."""
    init_ids = torch.tensor(encode_text(tokenizer, text, add_prefix=False)[:num_tokens])
    embedding: Any = student.get_input_embeddings()
    prompt_config = {"count": num_tokens, "first": add_memory_tokens(tokenizer, num_tokens)[0]}
    memory_tokens = MemoryTokenEmbedding(*embedding.weight.shape, **prompt_config).to(
        embedding.weight
    )
    memory_tokens.weight = embedding.weight  # a tied head stays tied
    student.set_input_embeddings(memory_tokens)
    student.config.memory_tokens = prompt_config
    init_memory_tokens(student, init_ids)
    return student


def add_memory_tokens(tokenizer: Any, num_tokens: int) -> list[int]:
    """Add memory tokens to a tokenizer, which puts them in front of every text; return their ids.

    `tokenizer(text)` begins with the end-of-text token, if there is one, and the memory tokens;
    `data.windows.get_prefix_ids` returns the same.
    """
    token_names = [MEMORY_TOKEN_FORMAT.format(index) for index in range(num_tokens)]
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in token_names],
        special_tokens=True,
    )
    tokenizer.init_kwargs["memory_tokens"] = num_tokens
    prepend_prefix(tokenizer)
    return get_prefix_ids(tokenizer)[-num_tokens:]
