"""A custom kind of memory: named by its path, trained, saved and loaded again."""

import json
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, make_llama, make_teacher
from transformers import AutoModelForCausalLM

import dmt
from dmt.config import MEMORY_CONFIGS, AssociativeConfig, DenseConfig, FeaturalConfig
from dmt.config_io import load_config, resolve_layer_memories, save_config
from dmt.errors import UserError
from dmt.memory import AssociativeMemory, FeaturalMemory, registry
from dmt.memory.registry import get_memory_class, list_memories
from dmt.models.conversion import convert_blocks
from dmt.models.memories import get_memories
from dmt.testing import check_memory

EXAMPLES = Path(__file__).parents[2] / "examples"
KIND = "own_memory:RowAttention"


@pytest.fixture(scope="module", autouse=True)
def own_memory():
    """Import the module of the example; restore the registry afterwards."""
    saved = [(table, dict(table)) for table in (MEMORY_CONFIGS, registry._MEMORY_CLASSES)]
    sys.path.insert(0, str(EXAMPLES))
    import own_memory

    yield own_memory
    sys.path.remove(str(EXAMPLES))
    del sys.modules["own_memory"]
    for table, items in saved:
        table.clear()
        table.update(items)


def test_built_in_kinds_are_registered_like_custom_ones():
    assert list_memories()[:2] == ["featural", "associative"]
    assert get_memory_class("featural") is FeaturalMemory
    assert get_memory_class("associative") is AssociativeMemory
    assert FeaturalMemory.config_class is FeaturalConfig
    assert AssociativeMemory.config_class is AssociativeConfig


def test_the_example_passes_every_check(own_memory):
    check_memory(own_memory.RowAttention, own_memory.RowAttentionConfig(num_rows=8))


def test_a_path_in_the_settings_imports_the_class(own_memory, tmp_path):
    config = load_config(None, ["memory.num_rows=8", f"memory.kind={KIND}"])
    assert config.memory == own_memory.RowAttentionConfig(num_rows=8)
    assert config.memory.kind == KIND
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_layers_may_have_different_kinds(own_memory):
    own = f"{{layers: 0, memory: {{kind: '{KIND}', num_rows: 8}}}}"
    rules = f"[{own}, {{layers: 1, memory: {{kind: dense}}}}]"
    config = load_config(None, ["memory.k=16", f"student.layer_overrides={rules}"])
    assert resolve_layer_memories(config, 3) == [
        own_memory.RowAttentionConfig(num_rows=8),
        DenseConfig(),
        FeaturalConfig(k=16),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.num_rows=0"], "memory.num_rows must be at least 1, got 0"),
        (["memory.rows=3"], "memory.rows is not a setting; did you mean memory.num_rows?"),
        (["memory.k=3"], "memory.k is not a setting of memory.kind=own_memory:RowAttention"),
    ],
)
def test_wrong_settings_of_a_custom_kind_are_rejected(own_memory, overrides, message):
    with pytest.raises(UserError) as error:
        load_config(None, [f"memory.kind={KIND}", *overrides])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "no_such_module:Memory",
            "memory.kind=no_such_module:Memory: module no_such_module cannot",
        ),
        ("own_memory:Nothing", "module own_memory has no Nothing"),
        ("torch.nn:Linear", "torch.nn:Linear is not a subclass of dmt.MemoryLayer"),
        ("dmt.memory.base:MemoryLayer", "is not registered; put @dmt.register_memory"),
        ("sparse", "memory.kind must be one of featural, associative, dense"),
        (":", "memory.kind=:: module '' cannot be imported"),
    ],
)
def test_an_unusable_kind_is_rejected(own_memory, kind, message):
    with pytest.raises(UserError) as error:
        load_config(None, [f"memory.kind='{kind}'"])
    assert message in str(error.value)


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_a_student_with_a_custom_memory_is_saved_and_loaded(own_memory, family, tokens, tmp_path):
    teacher = family()
    student = dmt.convert(teacher, own_memory.RowAttentionConfig(num_rows=8), layers="1-")
    assert list(get_memories(student)) == [1, 2]
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert isinstance(get_memories(loaded)[1], own_memory.RowAttention)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)


def test_loading_names_a_memory_that_cannot_be_imported(own_memory, tmp_path):
    student = dmt.convert(make_teacher(), own_memory.RowAttentionConfig(num_rows=8))
    student.save_pretrained(tmp_path / "student")
    script = (
        "import sys, dmt\nfrom transformers import AutoModelForCausalLM\n"
        "try: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except dmt.UserError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "student")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(dmt.__file__).parents[1])},
        check=False,
    )
    assert (
        f"memory of layer 0 is of kind {KIND}: module own_memory cannot be imported" in run.stdout
    )
    assert "add its folder to PYTHONPATH" in run.stdout


def test_the_report_names_the_tensors_that_a_custom_memory_replaces(own_memory):
    teacher = make_teacher()
    _, report = convert_blocks(teacher, [own_memory.RowAttentionConfig()] * LAYERS)
    status = {transfer.source: transfer.status for transfer in report.transfers}
    assert status["transformer.h.0.mlp.c_proj.bias"] == "memory"
    assert status["transformer.h.0.mlp.c_proj.weight"] == "dropped"
    targets = {transfer.target for transfer in report.transfers if transfer.status == "new"}
    assert targets == {
        f"transformer.h.{layer}.mlp.{name}"
        for layer in range(LAYERS)
        for name in ("keys", "values")
    }


def test_a_saved_student_names_the_kind_of_each_memory(tmp_path):
    configs = [FeaturalConfig(k=8), AssociativeConfig(k=8), DenseConfig()]
    student, _ = convert_blocks(make_teacher(), configs)
    student.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["memory"]
    assert {layer: memory["kind"] for layer, memory in saved.items()} == {
        "0": "featural",
        "1": "associative",
    }


# --- registration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmptyConfig(dmt.MemoryConfig):
    """A memory without settings."""


def test_invalid_registrations_are_rejected():
    class Memory(dmt.MemoryLayer):
        pass

    with pytest.raises(UserError, match=r"must be a subclass of dmt\.MemoryLayer"):
        dmt.register_memory("test_other", config=EmptyConfig)(torch.nn.Linear)
    with pytest.raises(UserError, match="config=int must be a dataclass"):
        dmt.register_memory("test_other", config=int)(Memory)
    with pytest.raises(UserError, match="must be a word such as row_attention, got a b"):
        dmt.register_memory("a b", config=EmptyConfig)(Memory)
    with pytest.raises(
        UserError, match=r"featural is dmt\.memory\.featural:FeaturalMemory already"
    ):
        dmt.register_memory("featural", config=EmptyConfig)(Memory)


def test_a_local_class_is_named_by_its_short_name():
    @dmt.register_memory("test_local", config=EmptyConfig)
    class Memory(dmt.MemoryLayer):
        pass

    assert Memory.kind == EmptyConfig().kind == "test_local"
    assert load_config(None, ["memory.kind=test_local"]).memory == EmptyConfig()


def test_the_guide_builds_a_memory_that_passes_every_check():
    text = (EXAMPLES.parent / "docs" / "guides" / "own-memory.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    code = blocks[0].replace('"row_attention"', '"guide_row_attention"')
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    namespace = {"__name__": "guide", "model": make_teacher()}
    sys.modules["guide"] = types.ModuleType("guide")
    try:
        sys.modules["guide"].__dict__.update(namespace)
        exec("\n".join([code, *blocks[1:]]), sys.modules["guide"].__dict__)
    finally:
        del sys.modules["guide"]


def test_a_trace_shows_the_rows_that_a_custom_memory_selects(own_memory, tokenizer):
    student = dmt.convert(make_teacher(len(tokenizer)), own_memory.RowAttentionConfig(num_rows=8))
    traces = dmt.trace(student, tokenizer, "the fox runs")
    activations = traces[-1].activations
    assert {activation.layer for activation in activations} == set(range(LAYERS))
    assert all(activation.kind == "slot" for activation in activations)
    assert all(0 <= activation.index < 8 and activation.weight > 0 for activation in activations)
