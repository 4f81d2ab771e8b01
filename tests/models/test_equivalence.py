"""A new student has its teacher's logits before anything is spent, or it is refused by name."""

import pytest
import torch
from conftest import LAYERS, SLOTS, make_llama, make_teacher
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dmt.config import AssociativeConfig, DenseConfig, FeaturalConfig
from dmt.errors import UserError
from dmt.memory import FeaturalMemory, slot_table
from dmt.models.conversion import convert, convert_blocks
from dmt.models.equivalence import check_equivalence, has_tied_head
from dmt.models.memories import get_featural_memories

FAMILIES = pytest.mark.parametrize("family", [make_teacher, make_llama])
ALL_SLOTS = FeaturalConfig(k=SLOTS)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def save_with_own_head(family, folder):
    """Save a model with a head of its own whose config says that it is tied."""
    model = family(tie_word_embeddings=False)
    head = model.get_output_embeddings().weight.data
    head.copy_(model.get_input_embeddings().weight + 0.3 * torch.randn_like(head))
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)


@FAMILIES
def test_a_head_is_tied_as_loaded_not_as_the_config_says(family, tokens, tmp_path):
    save_with_own_head(family, tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    assert not has_tied_head(teacher)
    student = convert(teacher, ALL_SLOTS)
    assert (logits(student, tokens) - logits(teacher, tokens)).abs().max() <= 1e-4
    assert student.config.tie_word_embeddings is False
    assert teacher.config.tie_word_embeddings is True, "the teacher stays as it is"
    student.save_pretrained(tmp_path / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(reloaded, tokens), logits(student, tokens))


@FAMILIES
def test_a_head_that_was_tied_by_hand_stays_tied(family, tokens, tmp_path):
    teacher = family(tie_word_embeddings=False)
    teacher.set_output_embeddings(teacher.get_output_embeddings())
    teacher.get_output_embeddings().weight = teacher.get_input_embeddings().weight
    student = convert(teacher, ALL_SLOTS)
    assert has_tied_head(student)
    assert student.config.tie_word_embeddings is True
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert has_tied_head(reloaded)
    assert torch.equal(logits(reloaded, tokens), logits(student, tokens))


@FAMILIES
@pytest.mark.parametrize(
    "memory",
    [
        FeaturalConfig(),
        FeaturalConfig(num_slots=SLOTS // 2, init="random"),
        FeaturalConfig(activation="relu"),
        AssociativeConfig(),
        AssociativeConfig(base="none", value_target="teacher"),
        DenseConfig(),
    ],
    ids=["whole", "fewer", "relu", "associative", "rows alone", "dense"],
)
def test_a_model_that_computes_more_than_its_class_is_refused(family, memory):
    teacher = family()
    convert_blocks(teacher, [memory] * LAYERS)  # memories that cannot be equal are left out
    teacher.get_submodule("lm_head").register_forward_hook(lambda *args: args[-1] * 1.1)
    with pytest.raises(UserError, match=r"cannot be cloned.*0\.091 .*tensors are equal.*hooks"):
        convert_blocks(teacher, [memory] * LAYERS)


def test_the_message_names_the_tensors_that_differ():
    teacher = make_llama()
    teacher.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(UserError, match=r"these tensors differ: model\.rotary_emb\.inv_freq[;,]"):
        convert(teacher, ALL_SLOTS)


def test_the_message_names_three_tensors_at_most(teacher):
    student = convert(teacher, ALL_SLOTS)
    teacher.lm_head.register_forward_hook(lambda *args: args[-1] * 1.1)
    pairs = {f"t{i}": (torch.zeros(2), torch.full((2,), float(i))) for i in range(5)}
    memories = get_featural_memories(student)
    with pytest.raises(UserError, match=r"differ: t1, t2, t3 \.\.\.; use"):
        check_equivalence(teacher, student, memories, pairs)
    del pairs["t4"]
    with pytest.raises(UserError, match="differ: t1, t2, t3; use"):
        check_equivalence(teacher, student, memories, pairs)


@pytest.mark.parametrize("memory", [FeaturalConfig(), AssociativeConfig()])
def test_another_function_in_the_slots_is_noticed(memory, monkeypatch):
    monkeypatch.setitem(slot_table.ACTIVATIONS, "gelu_new", lambda scores: F.gelu(scores))
    with pytest.raises(UserError, match="cannot be cloned"):
        convert_blocks(make_teacher(), [memory] * LAYERS)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_a_shorter_type_is_no_difference(family, dtype):
    teacher = family().to(dtype)
    student = convert(teacher, ALL_SLOTS)
    assert student.num_parameters() > 0


def test_products_of_fewer_digits_are_no_difference(teacher):
    """As of TF32 on a GPU."""
    teacher.lm_head.register_forward_hook(lambda *args: args[-1] * 1.001)
    with pytest.raises(UserError, match="cannot be cloned"):
        convert(teacher, ALL_SLOTS)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert convert(teacher, ALL_SLOTS).num_parameters() > 0
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_check_changes_neither_random_numbers_nor_modes(teacher):
    teacher.train()
    teacher.transformer.ln_f.eval()
    state = torch.random.get_rng_state()
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=4, search="int8")] * LAYERS)
    torch.random.set_rng_state(state)
    student_again, _ = convert_blocks(teacher, [FeaturalConfig(k=4, search="int8")] * LAYERS)
    assert teacher.training
    assert not teacher.transformer.ln_f.training
    assert not student.training
    memory = student.transformer.h[0].mlp
    assert (memory.k, memory.search) == (4, "int8")
    assert torch.equal(memory.keys, student_again.transformer.h[0].mlp.keys)
    state = torch.random.get_rng_state()
    check_equivalence(teacher, student, get_featural_memories(student), {})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_check_builds_no_index(teacher, monkeypatch):
    def refuse(*_):
        raise AssertionError("slots were searched")

    monkeypatch.setattr(FeaturalMemory, "_find_candidates", refuse)
    memory = FeaturalConfig(k=4, search="int8", offload="slots")
    assert convert(teacher, memory).num_parameters() > 0


@FAMILIES
def test_generation_settings_come_along(family, tmp_path):
    teacher = family()
    teacher.generation_config.update(eos_token_id=[0, 13], pad_token_id=0, repetition_penalty=1.3)
    student = convert(teacher, ALL_SLOTS)
    student.generation_config.max_new_tokens = 7
    assert teacher.generation_config.max_new_tokens != 7
    student.save_pretrained(tmp_path)
    settings = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert settings.eos_token_id == [0, 13]
    assert (settings.pad_token_id, settings.repetition_penalty) == (0, 1.3)
