"""`dmt.distill`: arguments, results and errors."""

import threading

import pytest
import torch
from conftest import SENTENCES, make_teacher

import dmt
from dmt.config import Config, FeaturalConfig, LossConfig
from dmt.distillation import run
from dmt.distillation.run import DistillResult

TINY = {
    "seq_len": 16,
    "batch_size": 4,
    "micro_batch_size": 2,
    "validation_tokens": 64,
    "test_tokens": 128,
    "calibration_tokens": 64,
    "layerwise_steps": 1,
    "end_to_end_steps": 2,
    "warmup_steps": 1,
    "num_threads": 1,
    "precision": "32-true",
    "accelerator": "cpu",
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 1,
    "progress_bar": False,
}
TEXTS = [f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(300)]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_distill_returns_the_student_and_its_metrics(teacher_folder, text_file, capfd):
    result = dmt.distill(teacher_folder, [text_file], mean_k=8, **TINY)
    assert isinstance(result, DistillResult)
    assert result.run_dir.name == "version_0"
    assert result.metrics["val/text/kl"] > 0
    assert result.metrics["test/text/kl"] == result.record["fidelity"]["text"]["kl"]
    assert result.metrics["train/loss"] > 0
    assert all(isinstance(value, int | float) for value in result.metrics.values())
    assert "test/text/kl=" in repr(result)
    assert str(result.student) in repr(result)
    assert result._repr_html_().startswith("<table>")
    model, tokenizer = result.load()
    ids = torch.tensor([tokenizer("the quick brown fox").input_ids])
    assert model(ids).logits.shape[-1] == len(tokenizer)
    assert "perplexity" not in capfd.readouterr().out, "a library call prints nothing"


def test_a_teacher_and_texts_in_memory_give_the_same_result_as_files(tokenizer, teacher, tmp_path):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.requires_grad_(True).train()
    in_memory = dmt.distill((teacher, tokenizer), TEXTS, mean_k=8, output="a", **TINY)
    assert in_memory.run_dir.name == "a"
    assert teacher.training, "the caller's model is unchanged"
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    teacher.save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    texts_file = in_memory.record["config"]["data"]["corpora"][0]
    from_files = dmt.distill("teacher", texts_file, mean_k=8, output="b", **TINY)
    assert in_memory.metrics == from_files.metrics
    assert "val/texts/kl" in in_memory.metrics


def test_settings_by_name_group_and_object(teacher_folder, text_file):
    result = dmt.distill(
        teacher_folder,
        str(text_file),
        FeaturalConfig(k=8),
        loss=LossConfig(hidden_mse=0.0, block_fvu=0.0),
        optim={"grad_clip": 0.5},
        seed=3,
        **TINY,
    )
    settings = result.record["config"]
    assert settings["memory"]["k"] == 8
    assert settings["loss"]["block_fvu"] == 0
    assert settings["optim"] | {"grad_clip": 0.5, "warmup_steps": 1} == settings["optim"]
    assert settings["seed"] == 3


def test_resuming_a_finished_run_returns_its_result(teacher_folder, text_file):
    arguments = (teacher_folder, [text_file])
    first = dmt.distill(*arguments, mean_k=8, output="runs/first", resume=True, **TINY)
    again = dmt.distill(*arguments, output="runs/first", resume=True)
    assert again.run_dir == first.run_dir
    assert again.metrics["test/text/kl"] == first.metrics["test/text/kl"]
    assert run.read_result(first.run_dir).metrics == again.metrics
    with pytest.raises(ValueError, match="first"):
        dmt.distill(*arguments, mean_k=8, output="runs/first", **TINY)


def test_distill_works_in_a_thread(teacher_folder, text_file):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(dmt.distill(teacher_folder, [text_file], mean_k=8, **TINY))
    )
    thread.start()
    thread.join(timeout=120)
    assert results[0].student.is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": 3}, "teacher must be a name, a path or a transformers model, got int"),
        ({"data": []}, "data must be names of corpora, paths or texts, at least one"),
        ({"data": [3]}, "data must be names of corpora, paths or texts"),
        ({"data": ["speeches", "one two three"]}, "data has texts and names"),
        ({"data": ["no_such_file.txt"]}, "no file or folder no_such_file.txt"),
        ({"resume": True}, "resume=True continues the run in output"),
        ({"men_k": 8}, "men_k is not an argument of distill or a setting"),
        ({"loss": 3}, "loss is a group of settings"),
        ({"loss": {"kk": 1}}, "kk is not a setting of loss"),
        ({"seq_len": 1}, "seq_len must be"),
    ],
)
def test_errors_name_the_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        dmt.distill(**({"teacher": "embedded", "data": ["speeches"]} | arguments))


def test_a_teacher_in_memory_needs_a_tokenizer_that_fits(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        dmt.distill(make_teacher(300), TEXTS)
    with pytest.raises(ValueError, match=r"has the token .* with its 100 embeddings does not"):
        dmt.distill(make_teacher(100), TEXTS, tokenizer=tokenizer, seq_len=16)


def test_an_ambiguous_setting_is_refused(monkeypatch):
    monkeypatch.setattr(run, "SETTING_GROUPS_BY_NAME", ("loss", "loss"))
    with pytest.raises(ValueError, match="kl is a setting of loss and loss"):
        run._find_group(Config(), "kl")
