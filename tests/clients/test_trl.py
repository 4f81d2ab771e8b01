"""TRL's trainers on a student: supervised, preferences, knowledge distillation, rewards."""

import pytest
import torch
from conftest import SENTENCES

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

PROMPT, CHOSEN, REJECTED = "Ada Holbrook was born in", " the town of Ravenhill", " a table of rows"


@pytest.fixture
def settings(tmp_path):
    return {
        "output_dir": str(tmp_path / "trl"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 3e-3,
    }


def repeat(count, **columns):
    return datasets.Dataset.from_dict({name: [value] * count for name, value in columns.items()})


def read_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def copy_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_weights(model, before):
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize("by_name", [False, True])
def test_sft(
    student, student_folder, student_tokenizer, settings, measure_loss, assert_loads_again, by_name
):
    trainer = trl.SFTTrainer(
        str(student_folder) if by_name else student,
        args=trl.SFTConfig(**settings, max_steps=8, per_device_train_batch_size=3, max_length=48),
        train_dataset=datasets.Dataset.from_dict({"text": SENTENCES * 8}),
        processing_class=student_tokenizer,
    )
    assert type(trainer.model) is type(student)
    start = measure_loss(trainer.model)
    trainer.train()
    assert measure_loss(trainer.model) < 0.9 * start
    trainer.save_model(student_folder.parent / "tuned")
    assert_loads_again(trainer.model, student_folder.parent / "tuned")


def test_dpo(student, student_tokenizer, settings):
    before = copy_weights(student)
    trainer = trl.DPOTrainer(
        student,
        args=trl.DPOConfig(**settings, max_steps=2, per_device_train_batch_size=2),
        train_dataset=repeat(4, prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED),
        processing_class=student_tokenizer,
    )
    trainer.train()
    first, second = read_losses(trainer)
    assert first == pytest.approx(0.6931, abs=1e-3)  # student and reference are the same model
    assert second < 0.99 * first
    assert changed_weights(student, before)
    assert not changed_weights(trainer.ref_model, before)


def test_gkd(student, long_teacher, student_tokenizer, settings, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    student_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": CHOSEN}]
    trainer = gkd.GKDTrainer(
        student,
        teacher_model=long_teacher,
        args=gkd.GKDConfig(
            **settings, max_steps=8, per_device_train_batch_size=2, max_length=48, lmbda=0.0
        ),
        train_dataset=repeat(16, messages=messages),
        processing_class=student_tokenizer,
    )
    trainer.train()
    losses = read_losses(trainer)
    assert losses[-1] < 0.9 * losses[0]


def test_grpo(student, student_tokenizer, settings):
    before = copy_weights(student)
    prompts = []

    def reward(prompts_of_batch, completions):
        prompts.extend(prompts_of_batch)
        return [float(len(completion)) for completion in completions]

    trainer = trl.GRPOTrainer(
        student,
        reward_funcs=lambda prompts, completions, **_: reward(prompts, completions),
        args=trl.GRPOConfig(
            **settings,
            max_steps=2,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=6,
        ),
        train_dataset=repeat(4, prompt=PROMPT),
        processing_class=student_tokenizer,
    )
    trainer.train()
    assert prompts == [PROMPT] * 4
    changed = changed_weights(student, before)
    assert any(".mlp." in name for name in changed)
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
