"""Where a context goes: LoRA, slots, weights and memory tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmt.config import Config, ContextConfig
from dmt.consolidation.targets import check_target, make_student, merge_adapters, prepare_student
from dmt.data.tokenizer import get_prefix_ids
from dmt.errors import UserError
from dmt.models.forward import (
    encode_text,
    forward_with_prefix,
)


def config_of(**context):
    return Config(context=ContextConfig(text="the quick brown fox", **context))


def test_a_plain_model_becomes_a_student_with_equal_logits(any_teacher, tokens):
    student = make_student(any_teacher)
    assert student.config.model_type.startswith("dmt_")
    torch.testing.assert_close(student(tokens).logits, any_teacher(tokens).logits)
    torch.testing.assert_close(make_student(student)(tokens).logits, any_teacher(tokens).logits)


def test_lora_starts_at_zero_and_is_merged(any_teacher, tokenizer, tokens):
    student, chosen = prepare_student(
        config_of(target="weights", lora_rank=2), make_student(any_teacher), tokenizer, "x"
    )
    torch.testing.assert_close(student(tokens).logits, any_teacher(tokens).logits)
    assert chosen
    assert all("lora_" in name for name in chosen)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == set(chosen)
    inside = {name.split(".lora_")[0].split(".", 3)[-1] for name in chosen}
    assert len(inside) >= 4, "attention and feed-forward blocks"
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.normal_(std=0.3)
    expected = student(tokens).logits.detach()
    assert (expected - any_teacher(tokens).logits).abs().max() > 0.1
    merged = merge_adapters(student)
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(make_student(any_teacher).state_dict())


def test_memory_tokens_are_embeddings_in_front_of_every_text(
    any_teacher, tokenizer, tokens, tmp_path
):
    vocabulary = len(tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "t"))
    student, chosen = prepare_student(
        config_of(target="prompt", prompt_length=3),
        make_student(any_teacher),
        tokenizer,
        "the quick brown fox",
    )
    assert list(chosen) == ["memory_tokens"]
    assert chosen["memory_tokens"].shape == (3, 16)
    before = get_prefix_ids(tokenizer)
    assert before == [0, vocabulary, vocabulary + 1, vocabulary + 2]
    torch.testing.assert_close(
        student(tokens).logits, any_teacher(tokens).logits
    )  # without memory tokens nothing changes
    embed = any_teacher.get_input_embeddings()
    with torch.no_grad():
        chosen["memory_tokens"].normal_()
    settings = torch.cat(
        [embed(torch.tensor([[0]] * 3)), chosen["memory_tokens"].expand(3, 3, 16), embed(tokens)], 1
    )
    expected = any_teacher(inputs_embeds=settings).logits[:, 4:]
    torch.testing.assert_close(forward_with_prefix(student, before, tokens).logits, expected)
    assert expected.shape[-1] == any_teacher.config.vocab_size, (
        "memory tokens are read and never generated"
    )
    forward_with_prefix(student, before, tokens).logits.sum().backward()
    assert chosen["memory_tokens"].grad.abs().sum() > 0
    student.save_pretrained(tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "s")
    loaded, resumed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "s"),
        AutoTokenizer.from_pretrained(tmp_path / "s"),
    )
    assert get_prefix_ids(resumed) == before
    assert resumed("the quick")["input_ids"] == before + encode_text(
        tokenizer, "the quick", add_prefix=False
    )
    torch.testing.assert_close(forward_with_prefix(loaded, before, tokens).logits, expected)
    message = loaded.generate(
        torch.tensor([before]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert message.shape == (1, 8)
    assert int(message[0, 4:].max()) < vocabulary


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_missing_targets_are_rejected(teacher, tokenizer, tmp_path):
    with pytest.raises(UserError, match="has none; name a distilled student"):
        check_target(ContextConfig(target="weights", trainable="slots"), teacher)
    tokenizer = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "t"))
    student, _ = prepare_student(
        config_of(target="prompt", prompt_length=2), make_student(teacher), tokenizer, "the quick"
    )
    with pytest.raises(UserError, match="has memory tokens already"):
        check_target(ContextConfig(target="prompt"), student)
