"""Where a context goes: what of a student may change, and how it is saved as a student like any other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedModel

from dmt.config import Config, ContextConfig, MemoryConfig
from dmt.data.encoding import MEMORY_TOKEN, start_of
from dmt.errors import UserError
from dmt.facts.states import encoded
from dmt.models.architectures import architecture_of
from dmt.models.modeling import build_student
from dmt.models.overlay import lift
from dmt.models.surgery import featural_of, transplant
from dmt.models.tokens import begin_with, tokens_of


def student_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that is a student, without facts: a plain model becomes one that has no memories."""
    if not model.config.model_type.startswith("dmt_"):
        return transplant(model, [MemoryConfig(kind="dense")] * model.config.num_hidden_layers)[0]
    arch = architecture_of(model.config.model_type)
    made = build_student(model.config, copy.deepcopy(model.config.memory) or {}, arch.no_dropout)
    made.load_state_dict(model.state_dict())
    return made.eval()


def check_destination(settings: ContextConfig, model: PreTrainedModel) -> None:
    """Raise `UserError` where the model lacks what the context is to go into, before anything is done."""
    if settings.into == "weights" and settings.weights == "slots" and not featural_of(model):
        raise UserError(
            "context.weights=slots are rows of featural memories, and this model has none; name a distilled student "
            "(teacher=lightning_logs/version_0/student), or set context.weights=lora"
        )
    if settings.into == "weights" and settings.weights == "lora":
        try:
            import peft  # noqa: F401
        except ImportError:
            raise UserError("context.weights=lora needs peft: pip install peft==0.21.2, or set context.weights=all") from None
    if settings.into == "tokens" and tokens_of(model) is not None:
        raise UserError(
            "this model has memory tokens already; consolidate into the model it was made from, or set context.into=memory"
        )


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
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=maps, fan_in_fan_out=wide), student)
    return {name: parameter for name, parameter in student.named_parameters() if "lora_" in name}


def _with_tokens(student: PreTrainedModel, tokenizer: Any, count: int, text: str) -> PreTrainedModel:
    """The student and `tokenizer` with so many memory tokens, which begin as the embeddings of the context's first words."""
    words = torch.tensor(encoded(tokenizer, text, start=False)[:count])
    first = name_tokens(tokenizer, count)[0]
    lift(student)
    arch = architecture_of(student.config.model_type)
    made = build_student(student.config, student.config.memory or {}, arch.no_dropout, {"count": count, "first": first})
    held = made.state_dict()
    for name, tensor in student.state_dict().items():
        held[name].copy_(tensor)
    begin_with(made, words)
    return made.eval().requires_grad_(False)


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
