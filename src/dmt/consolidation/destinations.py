"""Where a context goes: what of a student may change, and how it is saved as a student like any other."""

from __future__ import annotations

from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dmt.config import Config, ContextConfig, MemoryConfig
from dmt.data.encoding import MEMORY_TOKEN, start_of
from dmt.errors import UserError
from dmt.facts.states import encoded
from dmt.models.architectures import architecture_of
from dmt.models.loading import SAFELY
from dmt.models.overlay import lift
from dmt.models.surgery import featural_of, transplant
from dmt.models.tokens import MemoryTokens, begin_with, tokens_of


def student_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that is a student, without facts: a plain model becomes one that has no memories."""
    if not model.config.model_type.startswith("dmt_"):
        return transplant(model, [MemoryConfig(kind="dense")] * model.config.num_hidden_layers)[0]
    with TemporaryDirectory() as folder:  # rows of memories are more than tensors: what is saved is all there is
        model.save_pretrained(folder)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SAFELY)
    lift(student)
    return student.eval()


def check_destination(settings: ContextConfig, model: PreTrainedModel) -> None:
    """Raise `UserError` where the model lacks what the context is to go into, before anything is done."""
    if settings.into == "memory":
        return
    if getattr(model.config, "slots", None):
        raise UserError(
            f"context.into={settings.into} trains, and this student has left its slots on the disk; distil it with "
            "memory.disk=none, or set context.into=memory"
        )
    if settings.into == "tokens" and tokens_of(model) is not None:
        raise UserError(
            "this model has memory tokens already; consolidate into the model it was made from, or set context.into=memory"
        )
    if settings.into == "weights" and settings.weights == "slots" and not featural_of(model):
        raise UserError(
            "context.weights=slots are rows of featural memories, and this model has none; name a distilled student "
            "(teacher=lightning_logs/version_0/student), or set context.weights=lora"
        )
    if settings.into == "weights" and settings.weights == "lora" and find_spec("peft") is None:
        raise UserError("context.weights=lora needs peft: pip install peft==0.21.2, or set context.weights=all")


def prepare(config: Config, student: PreTrainedModel, tokenizer: Any, text: str) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """The student with what is to be trained in it, by name; nothing else of it has a gradient."""
    settings = config.context
    student.requires_grad_(False)
    if settings.into == "tokens":
        student = _with_tokens(student, tokenizer, settings.tokens, text)
        chosen = {"memory_tokens": tokens_of(student).memory}  # type: ignore[union-attr]
    elif settings.weights == "lora":
        chosen = _adapt(student, settings.rank)
    elif settings.weights == "slots":
        chosen = {
            f"layer_{layer}.{name}": parameter
            for layer, memory in featural_of(student).items()
            for name, parameter in memory.named_parameters()
        }
    else:
        chosen = dict(student.named_parameters())
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return student, chosen


def finish(student: PreTrainedModel) -> PreTrainedModel:
    """The student as it is saved: low-rank additions are added."""
    for name, module in list(student.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, module.get_base_layer())
    return student.requires_grad_(False).eval()


def _adapt(student: PreTrainedModel, rank: int) -> dict[str, nn.Parameter]:
    """Low-rank additions to every matrix of the transformer blocks.

    Source: Hu et al. 2021, arXiv 2106.09685, by peft.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    arch = architecture_of(student.config.model_type)
    inside = arch.whole_layers(student)
    names = sorted({name for name, module in inside.named_modules() if isinstance(module, nn.Linear | Conv1D)})
    maps = [f"{arch.layers}.{name}" for name in names]
    wide = any(isinstance(module, Conv1D) for module in inside.modules())
    with catch_warnings():  # peft says of each matrix that is stored the other way round that it has seen it
        filterwarnings("ignore", message="fan_in_fan_out is set to True")
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=maps, fan_in_fan_out=wide), student)
    return {name: parameter for name, parameter in student.named_parameters() if "lora_" in name}


def _with_tokens(student: PreTrainedModel, tokenizer: Any, count: int, text: str) -> PreTrainedModel:
    """The student and `tokenizer` with so many memory tokens, which begin as the embeddings of the context's first words."""
    words = torch.tensor(encoded(tokenizer, text, start=False)[:count])
    table: Any = student.get_input_embeddings()
    place = {"count": count, "first": name_tokens(tokenizer, count)[0]}
    tokens = MemoryTokens(*table.weight.shape, **place).to(table.weight)
    tokens.weight = table.weight  # the head goes on sharing it, where it did
    student.set_input_embeddings(tokens)
    student.config.memory_tokens = place
    begin_with(student, words)
    return student


def name_tokens(tokenizer: Any, count: int) -> list[int]:
    """Add `count` memory tokens to a tokenizer, which puts them before every text from then on; their ids.

    `tokenizer(text)` begins with the token that ends the text before, where there is one, and them; `data.encoding.start_of`
    gives the same.
    """
    names = [MEMORY_TOKEN.format(number) for number in range(count)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.init_kwargs["memory_tokens"] = count
    start = start_of(tokenizer)
    words = tokenizer.convert_ids_to_tokens(start)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*(f"{word}:0" for word in words), "$A:0"]), special_tokens=list(zip(words, start, strict=True))
    )
    return start[-count:]
