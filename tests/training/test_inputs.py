"""A resumed run is made from what it began with, wherever it is resumed."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_asserts import line_of
from conftest import SENTENCES, make_llama, make_teacher
from factories import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmt import config_io
from dmt.cli import main
from dmt.config import Config
from dmt.data.tokenizer import train_tokenizer
from dmt.errors import UserError
from dmt.files import RECORD_VERSION
from dmt.training.inputs import (
    check_corpora_vocabulary,
    check_inputs,
    hash_tokenizer,
    hash_weights,
    identify_inputs,
)
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


def test_digests_follow_names(teacher):
    tensors = {f"new_{name}": tensor for name, tensor in teacher.state_dict().items()}
    assert hash_weights(SimpleNamespace(state_dict=lambda: tensors)) != hash_weights(teacher)
    first, same, other = (
        SimpleNamespace(get_vocab=lambda vocabulary=vocabulary: vocabulary)
        for vocabulary in ({"a": 0, "b": 1}, {"b": 1, "a": 0}, {"a": 1, "b": 0})
    )
    assert hash_tokenizer(first) == hash_tokenizer(same) != hash_tokenizer(other)


def test_the_digest_of_a_config_does_not_depend_on_who_loads_it(teacher, tokenizer, monkeypatch):
    def hash_config():
        return identify_inputs(teacher, tokenizer, [])["model"]["config"]

    digest = hash_config()
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    teacher.config.name_or_path = "elsewhere"
    assert hash_config() == digest
    teacher.config.layer_norm_epsilon = 0.1
    assert hash_config() != digest


def test_all_that_changed_is_named(tmp_path):
    inputs = {
        "model": {"weights": "1", "config": "2"},
        "corpora": [{"name": "books", "digest": "3"}, {"name": "notes", "digest": "4"}],
        "texts": {"context": "5", "questions": "6"},
    }
    (tmp_path / "run.json").write_text(json.dumps({"format": RECORD_VERSION} | inputs))
    check_inputs(tmp_path, Config(), inputs)
    changed = {
        "model": inputs["model"] | {"config": "0"},
        "corpora": [inputs["corpora"][0], {"name": "notes", "digest": "0"}],
        "texts": inputs["texts"] | {"context": "0"},
    }
    message = r": the config of teacher=\S+, the text of notes, the context changed since the run"
    with pytest.raises(UserError, match=message):
        check_inputs(tmp_path, Config(), changed)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_no_split_may_have_a_token_that_the_model_lacks(tokenizer, split, caplog):
    caplog.set_level(logging.INFO, "dmt")
    splits = {name: torch.zeros(2, 3, dtype=torch.long) for name in ("train", "validation", "test")}
    data = SimpleNamespace(corpora=[SimpleNamespace(name="books", **splits)])
    check_corpora_vocabulary(make_teacher(len(tokenizer)), tokenizer, data)
    assert not caplog.messages
    smaller = make_teacher(len(tokenizer) - 1)
    check_corpora_vocabulary(smaller, tokenizer, data)
    assert caplog.messages == [
        f"the tokenizer has {len(tokenizer)} tokens, the model {len(tokenizer) - 1} embeddings"
    ]
    splits[split][1, 2] = len(tokenizer) - 1
    with pytest.raises(UserError, match=r"data\.corpora: books has the token"):
        check_corpora_vocabulary(smaller, tokenizer, data)


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
