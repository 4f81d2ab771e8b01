"""Saved students where dmt is not installed: errors of transformers, and the model card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import LAYERS, newest
from transformers import AutoConfig, AutoModelForCausalLM

from dmt.cli.main import distill_main
from dmt.config import Config, FeaturalConfig
from dmt.models.conversion import convert
from dmt.models.hub_files import CARD_FILE, CODE_FILE
from dmt.report.model_card import build_model_index, get_hub_name, read_license

SRC = Path(__file__).parents[2] / "src"
HIDE_DMT = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "dmt" or name.startswith("dmt."):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Hide())
"""
LOAD = """
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({folder!r}, **{options!r})).__module__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from conftest import make_teacher

    student = convert(make_teacher(), FeaturalConfig(k=8))
    folder = tmp_path_factory.mktemp("saved") / "student"
    student.save_pretrained(folder)
    return folder


def run_python(code, tmp_path):
    """Run code with this checkout on the path and an empty cache of remote code."""
    environment = os.environ | {
        "PYTHONPATH": str(SRC),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_without_dmt_the_error_names_the_package_to_install(folder, tmp_path):
    code = HIDE_DMT + LOAD.format(folder=str(folder), options={"trust_remote_code": True})
    process = run_python(code, tmp_path)
    assert process.returncode == 1
    assert "pip install discrete-memory-transformers, and import dmt" in process.stderr


def test_without_dmt_no_code_runs_without_consent(folder, tmp_path):
    process = run_python(HIDE_DMT + LOAD.format(folder=str(folder), options={}), tmp_path)
    assert process.returncode == 1
    assert "contains custom code" in process.stderr
    assert str(folder) in process.stderr


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}], ids=str)
def test_with_dmt_its_own_classes_are_used(folder, tmp_path, options):
    code = "import dmt" + LOAD.format(folder=str(folder), options=options)
    process = run_python(code, tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "dmt.models.modeling"
    assert not list((tmp_path / "hub").rglob(CODE_FILE)), "no code of the folder was loaded"


def test_with_dmt_installed_but_not_imported_remote_code_finds_it(folder, tmp_path):
    code = LOAD.format(folder=str(folder), options={"trust_remote_code": True})
    process = run_python(code, tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "dmt.models.modeling"


def test_saved_folders_stay_the_same_when_saved_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    type(model).register_for_auto_class()
    type(model.config).register_for_auto_class()
    model.save_pretrained(tmp_path / "again")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert (tmp_path / "again" / CODE_FILE).read_text() == (folder / CODE_FILE).read_text()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_dmt.MemoryGPT2Config",
        "AutoModel": "modeling_dmt.MemoryGPT2Model",
        "AutoModelForCausalLM": "modeling_dmt.MemoryGPT2LMHeadModel",
        "AutoModelForSequenceClassification": "modeling_dmt.MemoryGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_dmt.MemoryGPT2ForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_dmt.MemoryGPT2ForQuestionAnswering",
    }
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)


def read_card(folder):
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_saved_models_have_a_card_that_is_not_overwritten(folder, tmp_path):
    metadata, body = read_card(folder)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "dmt" in metadata["tags"]
    assert "pip install discrete-memory-transformers" in body
    assert f"{LAYERS} of {LAYERS} feed-forward blocks" in body
    (tmp_path / CARD_FILE).write_text("edited")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == "edited"


def test_the_card_of_a_run_has_its_results(distill_args, tmp_path, teacher_folder):
    (teacher_folder / CARD_FILE).write_text("---\nlicense: cc-by-4.0\n---\n# teacher\n")
    assert distill_main(distill_args) == 0
    run_dir = newest(tmp_path)
    metadata, body = read_card(run_dir / "student")
    scores = json.loads((run_dir / "run.json").read_text())["fidelity"]["text"]
    [entry] = metadata["model-index"]
    assert entry["name"] == run_dir.name
    [result] = entry["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["kl"] == pytest.approx(scores["kl"], abs=1e-6)
    assert metadata["license"] == "cc-by-4.0"
    assert "base_model" not in metadata, "a local folder has no name on the hub"
    assert str(tmp_path) not in body, "no local paths are published"
    assert "| text: KL, nats/token ↓ |" in body


def test_only_teachers_on_the_hub_have_a_hub_name(tmp_path):
    assert get_hub_name("gpt2") == "gpt2"
    assert get_hub_name("org/name") == "org/name"
    assert get_hub_name("embedded") is None
    assert get_hub_name(str(tmp_path)) is None
    assert get_hub_name("../missing/x") is None
    assert read_license(str(tmp_path)) is None
    assert build_model_index({}) == []
    assert Config().teacher == "embedded"
