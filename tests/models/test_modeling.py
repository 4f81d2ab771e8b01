"""A student is a causal transformers model; saving and loading keep its outputs."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import LAYERS, SLOTS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.trainer_pt_utils import LabelSmoother

import dmt
from dmt.config import DenseConfig, FeaturalConfig
from dmt.errors import UserError
from dmt.models.architectures import ARCHITECTURES
from dmt.models.conversion import convert_blocks
from dmt.models.memories import get_memories
from dmt.models.modeling import STUDENT_CLASSES

VARIANTS = {
    "default": FeaturalConfig(),
    "softmax": FeaturalConfig(
        k=None, activation="softmax", selection="score", init="random", projections=True
    ),
    "top": FeaturalConfig(k=None),
    "heads": FeaturalConfig(heads=2, k=8, selection="contribution", projections=True),
    "all": FeaturalConfig(k=SLOTS),
}


@pytest.fixture(params=VARIANTS)
def student(request, any_teacher):
    memory = VARIANTS[request.param]
    if memory.activation == "softmax" and any_teacher.config.model_type == "llama":
        memory = replace(memory, activation="relu")  # softmax does not support gains
    model, _ = convert_blocks(any_teacher, [memory, DenseConfig(), memory])
    with torch.no_grad():  # so that no tensor has its initial value
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        for memory in get_memories(model).values():
            for buffer in memory.buffers():
                buffer.copy_(torch.rand_like(buffer) * 0.5)
    return model.eval()


@torch.no_grad()
def test_saved_and_loaded_is_equal(student, tokenizer, tokens, tmp_path):
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    assert list(get_memories(loaded)) == [0, 2]
    names = {file.name for file in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
    assert AutoTokenizer.from_pretrained(tmp_path)("fox").input_ids == tokenizer("fox").input_ids


@torch.no_grad()
def test_the_future_never_leaks(student, tokens):
    for position in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = (tokens[:, position] + 1) % 300
        before, after = student(tokens).logits, student(changed).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])


@torch.no_grad()
def test_sequences_of_a_batch_are_independent(student, tokens):
    changed = tokens.clone()
    changed[1] = (tokens[1] + 1) % 300
    assert torch.equal(student(tokens).logits[[0, 2]], student(changed).logits[[0, 2]])


@torch.no_grad()
def test_generation_with_and_without_cache_is_equal(student, tokens):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = tokens[:, :8]
    cached, plain = (
        student.generate(prompts, attention_mask=torch.ones_like(prompts), use_cache=u, **options)
        for u in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape[1] == 20


def test_pipeline_and_auto_classes_work_in_a_new_process(teacher, tokenizer, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    script = (
        "import sys, dmt; assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, pipeline\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)\n"
        f"print(AutoConfig.from_pretrained({str(tmp_path)!r}).model_type)\n"
        f"generate = pipeline('text-generation', {str(tmp_path)!r})\n"
        "print(len(generate('the fox', max_new_tokens=3)[0]['generated_text']))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    name, kind, length = run.stdout.split()
    assert (name, kind) == ("MemoryGPT2LMHeadModel", "dmt_gpt2")
    assert int(length) > len("the fox")


def test_gradient_checkpointing_gives_the_same_gradient(student, tokens):
    student.train()
    plain = torch.autograd.grad(
        student(tokens, labels=tokens).loss, get_memories(student)[0].values
    )[0]
    student.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = torch.autograd.grad(
        student(tokens, labels=tokens, use_cache=False).loss, get_memories(student)[0].values
    )[0]
    torch.testing.assert_close(recomputed, plain)


def test_a_pipeline_generates_text(student, tokenizer):
    outputs = pipeline("text-generation", model=student, tokenizer=tokenizer)(
        "the quick", max_new_tokens=4, do_sample=False
    )
    assert outputs[0]["generated_text"].startswith("the quick")


def test_a_new_family_is_registered_by_one_entry(tokens, tmp_path):
    config = Qwen2Config(
        vocab_size=int(tokens.max()) + 1,
        hidden_size=16,
        intermediate_size=SLOTS,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    teacher = Qwen2ForCausalLM(config).eval()
    with pytest.raises(UserError, match=r"'qwen2' is not supported; supported are gpt2, llama, "):
        dmt.convert(teacher, FeaturalConfig(k=SLOTS))
    classes = ("Qwen2Config", "Qwen2Model", "Qwen2ForCausalLM")
    try:
        dmt.register_architecture("qwen2", replace(ARCHITECTURES["llama"], classes=classes))
        with pytest.raises(UserError, match="family=qwen2 is supported already"):
            dmt.register_architecture("qwen2", ARCHITECTURES["llama"])
        student = dmt.convert(teacher, FeaturalConfig(k=SLOTS, selection="score"))
        assert type(student).__name__ == "MemoryQwen2ForCausalLM"
        assert transformers.MemoryQwen2ForCausalLM is type(student)
        student.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            expected = teacher(tokens).logits
            torch.testing.assert_close(student(tokens).logits, expected)
            assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    finally:
        ARCHITECTURES.pop("qwen2", None)
        STUDENT_CLASSES.pop("qwen2", None)


def test_a_family_missing_from_transformers_is_rejected():
    classes = ("NoConfig", "GPT2Model", "GPT2LMHeadModel")
    with pytest.raises(UserError, match="has no NoConfig"):
        dmt.register_architecture("no", replace(ARCHITECTURES["gpt2"], classes=classes))


def test_label_smoothing_of_the_trainer_predicts_the_next_token(any_teacher, tokens, tmp_path):
    student = dmt.convert(any_teacher, FeaturalConfig(k=SLOTS))
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none"
    )
    batch = {"input_ids": tokens, "labels": tokens}
    loss = Trainer(student, arguments).compute_loss(student, dict(batch))
    expected = LabelSmoother(0.1)(student(tokens), tokens, shift_labels=True)
    torch.testing.assert_close(loss, expected)


def test_classes_are_looked_up_by_name(any_teacher, tmp_path):
    """TRL and `transformers serve` look up the name in `config.architectures`."""
    student = dmt.convert(any_teacher, FeaturalConfig(k=SLOTS))
    student.save_pretrained(save_directory=tmp_path)
    [name] = transformers.AutoConfig.from_pretrained(tmp_path).architectures
    loaded = getattr(transformers, name).from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert type(loaded) is type(student)
    assert getattr(transformers, type(student.config).__name__) is type(student.config)


HEADS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)


@torch.no_grad()
@pytest.mark.parametrize("external", ["none", "values", "slots"])
def test_the_backbone_alone_computes_the_same_states(any_teacher, tokens, tmp_path, external):
    memory = FeaturalConfig(
        k=8, offload=external, search="int8" if external == "slots" else "exact"
    )
    student = dmt.convert(any_teacher, memory).eval()
    student.save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expected = student(tokens, output_hidden_states=True).hidden_states[-1]
    backbone = AutoModel.from_pretrained(tmp_path / "student")
    assert torch.equal(backbone(tokens).last_hidden_state, expected)
    backbone.save_pretrained(tmp_path / "backbone")
    again = AutoModel.from_pretrained(tmp_path / "backbone")
    assert torch.equal(again(tokens).last_hidden_state, expected)
    # The head of these teachers is the table of embeddings, so nothing else is missing.
    if any_teacher.config.tie_word_embeddings:
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
        assert torch.equal(whole(tokens).logits, student(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_heads_of_the_family_stand_on_the_memories(any_teacher, tokens, tmp_path, head):
    student = dmt.convert(any_teacher, FeaturalConfig(k=8, offload="values")).eval()
    student.save_pretrained(tmp_path / "student")
    backbone = AutoModel.from_pretrained(tmp_path / "student")
    model = head.from_pretrained(tmp_path / "student", pad_token_id=0)
    torch.testing.assert_close(
        model.base_model(tokens).last_hidden_state, backbone(tokens).last_hidden_state
    )
    model.save_pretrained(tmp_path / "head")
    again = head.from_pretrained(tmp_path / "head")
    for logits, expected in zip(again(tokens).to_tuple(), model(tokens).to_tuple(), strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(logits, expected)


def test_facts_are_left_to_the_language_model(artifacts_dir, caplog):
    model = AutoModel.from_pretrained(artifacts_dir / "logs" / "version_0" / "student")
    assert type(model).__name__ == "MemoryGPT2Model"
    assert "memory.db is not loaded: facts and rows" in caplog.text


def test_generation_is_a_direct_base_and_plans_name_modules_that_exist(any_teacher):
    student = dmt.convert(any_teacher, FeaturalConfig(k=8))
    assert GenerationMixin in type(student).__bases__
    assert not [name for name in student.config.base_model_tp_plan or {} if "mlp" in name]


def test_heads_take_gradient_checkpointing_from_the_config(teacher):
    config = dmt.convert(teacher, FeaturalConfig(k=8)).config
    config.gradient_checkpointing = True
    model = AutoModelForSequenceClassification.from_config(config)
    assert model.is_activation_checkpointing
