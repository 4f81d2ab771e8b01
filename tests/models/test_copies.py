"""Copied and pickled students compute what the original does."""

import copy
import pickle

import pytest
import torch
from conftest import make_teacher
from transformers import AutoModelForCausalLM

import dmt
from dmt.config import AssociativeConfig, FeaturalConfig
from dmt.errors import UserError
from dmt.memory.associative import enable_writes
from dmt.memory.mmap_tensors import MmapTensorFile
from dmt.models.external_tensors import SLOTS_FILE
from dmt.models.memories import get_associative_memories

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
MEMORIES = {
    "values": FeaturalConfig(k=8, offload="values"),
    "slots": FeaturalConfig(k=8, offload="slots", search="int8"),
    "int8": FeaturalConfig(k=8, value_dtype="int8"),
}


@pytest.fixture(params=MEMORIES)
def mapped(request, tmp_path):
    dmt.convert(make_teacher(), MEMORIES[request.param]).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("copy_model", COPIES.values(), ids=COPIES)
def test_a_copy_maps_the_file_again(mapped, tokens, tmp_path, copy_model):
    memory = mapped.transformer.h[0].mlp
    expected = mapped(tokens).logits
    if memory.offload != "none":
        assert memory.values.numpy().tobytes() not in pickle.dumps(memory)
    copied = copy_model(mapped)
    assert torch.equal(copied(tokens).logits, expected)
    copied.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, expected)


def test_a_file_that_changed_since_is_refused(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        student = dmt.convert(make_teacher(), FeaturalConfig(k=8, init="random", offload="values"))
        student.save_pretrained(tmp_path)
        if seed == 0:
            pickled = pickle.dumps(MmapTensorFile(tmp_path / SLOTS_FILE))
    with pytest.raises(UserError, match="no longer the file that this student was loaded from"):
        pickle.loads(pickled)


@torch.no_grad()
def test_a_model_from_config_and_state_dict_lacks_the_file(mapped, tokens):
    fresh = type(mapped)(mapped.config)
    fresh.load_state_dict(mapped.state_dict())
    with pytest.raises(UserError, match="slots are in a file that is not open"):
        fresh.eval()(tokens)


@torch.no_grad()
@pytest.mark.parametrize("copy_model", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "memory",
    [
        FeaturalConfig(k=8, search="ivf", selection="contribution"),
        AssociativeConfig(min_distance=0.01, value_target="projection", index="flat", knn_k=2),
    ],
    ids=["ivf", "flat"],
)
def test_a_copy_builds_its_own_index(tokens, copy_model, memory):
    student = dmt.convert(make_teacher(), memory, calibration=tokens).eval()
    memories = list(get_associative_memories(student).values())
    with enable_writes(memories):
        student(tokens)
    for associative in memories:
        associative.commit_step()
    expected = student(tokens[:1, :3]).logits
    copied = copy_model(student)
    torch.testing.assert_close(copied(tokens[:1, :3]).logits, expected)
