"""transformers' Trainer: plain, with label smoothing, checkpointing and bfloat16, and resumed."""

import pytest
import torch
from conftest import SENTENCES
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import dmt

ANSWER = " dog"  # of the fact that `artifacts_dir` has


@pytest.fixture
def make_trainer(student_tokenizer, tmp_path):
    """Return a function that makes a Trainer of a model; changes are `TrainingArguments`."""

    def make(model, **changes):
        settings = {
            "max_steps": 8,
            "per_device_train_batch_size": 3,
            "learning_rate": 5e-3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(tmp_path / "trainer", **(settings | changes))
        collator = DataCollatorForLanguageModeling(student_tokenizer, mlm=False)
        data = [student_tokenizer(sentence) for sentence in SENTENCES * 8]
        return Trainer(model, arguments, train_dataset=data, data_collator=collator)

    return make


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_training_lowers_the_loss_and_saves_the_student(
    make_trainer, student, measure_loss, assert_loads_again, tmp_path, label_smoothing
):
    start = measure_loss(student)
    trainer = make_trainer(student, label_smoothing_factor=label_smoothing)
    trainer.train()
    assert measure_loss(student) < 0.8 * start
    trainer.save_model(tmp_path / "trained")
    assert_loads_again(student, tmp_path / "trained")


def test_checkpointing_changes_no_weight_of_bfloat16_training(
    make_trainer, student, student_folder, measure_loss
):
    start = measure_loss(student)
    make_trainer(student, bf16=True).train()
    assert measure_loss(student) < 0.8 * start
    other = AutoModelForCausalLM.from_pretrained(student_folder)
    make_trainer(other, bf16=True, gradient_checkpointing=True).train()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


def test_a_resumed_training_has_equal_weights(make_trainer, student, student_folder, tmp_path):
    make_trainer(student, save_strategy="steps", save_steps=4).train()
    resumed = AutoModelForCausalLM.from_pretrained(student_folder)
    checkpoint = str(tmp_path / "trainer" / "checkpoint-4")
    make_trainer(resumed).train(resume_from_checkpoint=checkpoint)
    for name, value in student.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_facts_are_in_the_checkpoints(make_trainer, student_tokenizer, artifacts_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(artifacts_dir / "logs/version_0/student")
    make_trainer(
        model, max_steps=2, learning_rate=1e-4, save_strategy="steps", save_steps=2
    ).train()
    checkpoint = tmp_path / "trainer" / "checkpoint-2"
    student_tokenizer.save_pretrained(checkpoint)
    with dmt.Memory.open(checkpoint) as memory:
        assert [record.answer for record in memory.records.values()] == [ANSWER]
        trained = memory.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(trained[name], value), name
