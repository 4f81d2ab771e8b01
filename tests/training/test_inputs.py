"""A resumed run is made from what it began with, wherever it is resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_asserts import line_of
from conftest import SENTENCES, make_llama, make_teacher
from factories import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmt import config_io
from dmt.cli import main
from dmt.data.tokenizer import train_tokenizer
from dmt.training.inputs import hash_tokenizer, hash_weights
from dmt.training.run_dir import read_record

RESUME = ["--resume", "logs/version_0"]
SHORT = [*TINY, "stages.layerwise_steps=0", "stages.end_to_end_steps=1"]


@pytest.fixture
def run_folder(tmp_path, monkeypatch, tokenizer):
    """A folder with a teacher, a text and a run of one step, as the working directory."""
    monkeypatch.chdir(tmp_path)
    make_teacher(len(tokenizer)).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    write_text()
    assert main.distill_main(SHORT) == 0
    return tmp_path


def write_text(start=0):
    lines = [f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(start, start + 200)]
    Path("text.txt").write_text("\n\n".join(lines), encoding="utf-8")


def change_weights():
    model = make_teacher()
    model.transformer.wte.weight[0, 0] += 1e-3
    model.save_pretrained("teacher")


def change_config():
    path = Path("teacher/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-4}))


def change_tokenizer():
    train_tokenizer(SENTENCES[:2], 300, 32).save_pretrained("teacher")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, "the weights of teacher=teacher changed"),
        (change_config, "the config of teacher=teacher changed"),
        (change_tokenizer, "the tokenizer of teacher=teacher"),
        (lambda: write_text(1), "the text of text changed"),
    ],
    ids=["weights", "config", "tokenizer", "text"],
)
def test_a_run_is_not_resumed_on_something_else(run_folder, change, message, capsys):
    before = read_record(Path("logs/version_0"))
    change()
    capsys.readouterr()
    code = main.distill_main(RESUME)
    printed = capsys.readouterr()
    line = line_of(code, printed.out, printed.err)
    assert f"--resume logs/version_0: {message}" in line
    assert "start anew: dmt distill logs/version_0/config.yaml" in line
    assert code == 2
    assert read_record(Path("logs/version_0")) == before


def test_a_run_is_resumed_and_repeated_in_another_folder(run_folder, monkeypatch):
    assert read_record(Path("logs/version_0"))["working_dir"] == "../.."
    (run_folder / "elsewhere").mkdir()
    monkeypatch.chdir(run_folder / "elsewhere")
    Path("text.txt").write_text("another text", encoding="utf-8")
    assert main.distill_main(["--resume", "../logs/version_0"]) == 0
    saved = Path("../logs/version_0/config.yaml").read_text(encoding="utf-8")
    assert "teacher: teacher\n" in saved, "the settings stay as they were typed"
    for name in ("config.yaml", "run.json"):
        config = config_io.load_config(f"../logs/version_0/{name}")
        assert config.teacher == str(run_folder / "teacher")
        assert config.data.corpora == [str(run_folder / "text.txt")]
        assert config.trainer.log_dir == "logs"


def test_a_copy_of_the_folder_is_resumed_on_its_own_files(run_folder, tmp_path, monkeypatch):
    shutil.copytree(run_folder / "logs", tmp_path / "copy" / "logs")
    shutil.copytree(run_folder / "teacher", tmp_path / "copy" / "teacher")
    config = config_io.load_config(tmp_path / "copy" / "logs" / "version_0" / "run.json")
    assert config.teacher == str(tmp_path / "copy" / "teacher")
    assert config.data.corpora == ["text.txt"], "as it was typed, where the copy has none"


def test_names_of_shipped_models_and_corpora_are_no_paths(run_folder, monkeypatch):
    Path("embedded").mkdir()
    record = json.loads(Path("logs/version_0/run.json").read_text())
    record["config"] |= {"teacher": "embedded"}
    Path("logs/version_0/run.json").write_text(json.dumps(record))
    monkeypatch.chdir("embedded")
    assert config_io.load_config("../logs/version_0/run.json").teacher == "embedded"


def test_a_record_without_digests_is_resumed(run_folder):
    """Runs of an earlier version have none."""
    path = Path("logs/version_0/run.json")
    record = json.loads(path.read_text())
    for name in ("model", "corpora", "texts", "working_dir"):
        del record[name]
    path.write_text(json.dumps(record))
    change_weights()
    assert main.distill_main(RESUME) == 0


def test_digests_follow_the_tensors_and_not_the_calls(teacher, tokenizer):
    digest = hash_weights(teacher)
    assert digest == hash_weights(make_teacher(len(tokenizer)))
    assert digest != hash_weights(make_teacher(len(tokenizer)).bfloat16())
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] += 1e-6
    assert digest != hash_weights(teacher)
    before = hash_tokenizer(tokenizer)
    tokenizer(SENTENCES, truncation=True, max_length=4)
    assert hash_tokenizer(tokenizer) == before


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_a_model_may_have_any_number_of_spare_rows(family, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    family(len(tokenizer) + 234).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    write_text()
    assert main.distill_main(SHORT) == 0
    student = AutoModelForCausalLM.from_pretrained("logs/version_0/student")
    assert student.config.vocab_size == len(tokenizer) + 234


def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    larger = train_tokenizer(SENTENCES * 3, 300, 32)
    make_teacher(len(larger)).save_pretrained("teacher")
    larger.add_special_tokens({"additional_special_tokens": ["<PRE>", "<EOT>"]})
    larger.save_pretrained("teacher")
    write_text()
    assert main.distill_main(SHORT) == 0
    assert len(AutoTokenizer.from_pretrained("logs/version_0/student")) == len(larger)
    capsys.readouterr()
    Path("text.txt").write_text(Path("text.txt").read_text().replace("dog", "<EOT>"))
    code = main.distill_main(SHORT)
    printed = capsys.readouterr()
    line = line_of(code, printed.out, printed.err)
    assert "data.corpora: text has the token <EOT>, which the tokenizer has and the model" in line
    assert "with its 300 embeddings does not" in line
    code = main.main(["generate", "Ada <PRE>", "-m", "logs/version_0"])
    printed = capsys.readouterr()
    assert code == 2
    assert "the prompt, with room for an answer, has the token <PRE>" in printed.err
