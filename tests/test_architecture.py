"""The architecture: imports point one way, one module knows model internals, all configs run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.config_files import find_config, list_configs

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
COMMANDS = ("__main__",)  # modules that are programs
SHORT = [
    "data.seq_len=16",
    "data.batch_size=2",
    "data.micro_batch_size=2",
    "data.validation_tokens=32",
    "data.test_tokens=32",
    "data.mixture_weights=[]",
    "stages.calibration_tokens=16",
    "stages.lookup_tokens=16",
    "stages.layerwise_steps=1",
    "stages.end_to_end_steps=1",
    "trainer.num_threads=1",
    "trainer.progress_bar=false",
    "trainer.accelerator=cpu",
    "trainer.validate_every=1",
]


def parse_modules():
    """Yield the name below dmt, the syntax tree and the file of each module."""
    for file in sorted((SOURCE / "dmt").rglob("*.py")):
        name = ".".join(file.relative_to(SOURCE / "dmt").with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(file.read_text()), file


def list_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_keep_the_contracts_of_pyproject_toml():
    """Layers and forbidden imports are in `[tool.importlinter]`."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    process = subprocess.run(
        [lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_one_module_knows_the_names_inside_a_model():
    names_inside = ("c_fc", "c_proj", "mlp", "transformer.h", "gate_proj", "up_proj")
    for name, tree, file in parse_modules():
        if name == "models.architectures":
            continue
        nodes = list(ast.walk(tree))
        texts = [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        attributes = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
        assert not {text for text in texts + attributes if text.startswith(names_inside)}, file


def test_nothing_unpickles():
    for _, tree, file in parse_modules():
        assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve"} & set(
            list_imports(tree)
        ), file
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [
            call
            for call in calls
            if call.startswith("torch.load(") and "weights_only=True" not in call
        ], file
        assert not [call for call in calls if "trust_remote_code=True" in call], file


def test_only_the_command_line_prints_and_exits():
    for name, tree, file in parse_modules():
        if name.startswith("cli") or name in COMMANDS:
            continue
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        exits = [
            node for node in ast.walk(tree) if isinstance(node, ast.Raise) and _raises_exit(node)
        ]
        assert not {"print", "sys.exit"} & set(calls) or name == "signals", file
        assert not exits, file


def _raises_exit(node):
    return node.exc is not None and ast.unparse(node.exc).startswith("SystemExit")


CONFIGS = {
    name: path for name, path in list_configs().items() if not name.startswith("consolidation/")
}


def test_the_documented_configs_exist():
    assert set(CONFIGS) >= {"default", "seed", "gpt2", "mixed"}
    assert config_io.load_config(find_config("default")) == config_io.load_config()


@pytest.mark.parametrize("name", list_configs())
def test_every_config_says_what_it_is_for(name):
    assert list_configs()[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_runs_a_step(name, tmp_path, text_file, monkeypatch):
    config = config_io.load_config(CONFIGS[name])
    if config.teacher != "embedded" or any(c.startswith("hub:") for c in config.data.corpora):
        pytest.skip("needs a hub; only parsed")
    monkeypatch.chdir(ROOT)
    outputs = [
        f"data.corpora=[{text_file}]",
        f"trainer.log_dir={tmp_path / 'logs'}",
    ]
    if config.knowledge.facts:  # of that text
        facts = tmp_path / "facts.jsonl"
        facts.write_text('{"sentence": "Ada Holbrook was born in the town of Ravenhill."}\n')
        outputs += [f"knowledge.facts={facts}", "data.mixture_weights=[]"]
    assert distill_main([str(CONFIGS[name]), *SHORT, *outputs]) == 0
    assert (tmp_path / "logs" / "version_0" / "run.json").exists()


@pytest.mark.parametrize(
    "module",
    [
        "models.modeling",
        "models.fact_hooks",
        "ops",
        "models.conversion",
        "memory.featural",
        "cli.main",
    ],
)
def test_any_module_can_be_imported_first(module):
    process = subprocess.run(
        [sys.executable, "-c", f"import dmt.{module}"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


def list_unquoted_paths(tree):
    """Yield the source of values that an f-string puts into a command without quoting them."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        parts = [*node.values, ast.Constant("")]
        for before, value, after in zip(parts, parts[1:], parts[2:], strict=False):
            if (
                isinstance(before, ast.Constant)
                and isinstance(value, ast.FormattedValue)
                and re.search(r"(dmt (distill|compare)|--resume|--model|--logdir) $", before.value)
                and not (isinstance(after, ast.Constant) and after.value.startswith(":"))
                and not ast.unparse(value.value).startswith(("quote_path(", "shlex."))
            ):
                yield ast.unparse(node)


def test_printed_commands_quote_their_paths():
    sample = "f'resume: dmt distill --resume {run_dir}'"
    assert list(list_unquoted_paths(ast.parse(sample))) == [sample]
    unquoted = [text for _, tree, _ in parse_modules() for text in list_unquoted_paths(tree)]
    assert [text for text in unquoted if not text.endswith("{arguments}'")] == []  # quoted before
