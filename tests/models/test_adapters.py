"""Adapters of peft on students: attention by default, single tensors of memories by name."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import dmt
from dmt.config import FeaturalConfig
from dmt.memory import FeaturalMemory
from dmt.memory.slot_table import TensorCache
from dmt.models.memories import get_memories

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out is set:UserWarning"
)


@pytest.fixture
def student(any_teacher, tokens):
    return dmt.convert(any_teacher, FeaturalConfig(), calibration=tokens).eval()


def test_the_default_trains_the_attention(student):
    model = peft.get_peft_model(student, peft.LoraConfig(r=2))
    names = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in list_trained(model)}
    assert names in ({"c_attn"}, {"q_proj", "v_proj"})


def list_trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("first", ["dmt", "peft"])
def test_the_default_is_registered_in_either_order(first):
    second = {"dmt": "peft", "peft": "dmt"}[first]
    code = f"import {first}, {second}; from peft.utils import constants as c\n"
    code += "import transformers\n"
    code += "print(c.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['dmt_llama'])"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.stdout.strip() == "['q_proj', 'v_proj']", process.stderr


def test_tensors_of_memories_are_adapted_saved_and_merged(student, tokens, tmp_path):
    student.save_pretrained(tmp_path / "student")
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.values", "mlp.keys"],
        init_lora_weights=False,
    )
    with torch.no_grad():
        before = student(tokens).logits
        model = peft.get_peft_model(student, config).eval()
        expected = model(tokens).logits
    assert not torch.allclose(expected, before)
    model(tokens, labels=tokens).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grads[name].abs().sum() > 0 for name in list_trained(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    merged = model.merge_and_unload()
    assert all(isinstance(memory, FeaturalMemory) for memory in get_memories(merged).values())
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        for other in (loaded, merged, reloaded):
            torch.testing.assert_close(other(tokens).logits, expected)


def test_a_new_tensor_at_an_old_address_is_not_taken_for_the_old_one():
    cache, storage = TensorCache(), torch.zeros(2)
    first = storage.view(2)
    cache("sum", torch.sum, (first,))
    storage.numpy()[:] = 1  # not counted by the version
    assert cache("sum", torch.sum, (storage.view(2),)) == 2
