"""accelerate: a student whose weights wait in RAM or on disk answers as before."""

import pytest
import torch
from transformers import AutoModelForCausalLM

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(params=["plain", "with facts"])
def folder(request):
    """The folder of a student, and of one with a fact."""
    if request.param == "plain":
        return request.getfixturevalue("student_folder")
    return request.getfixturevalue("artifacts_dir") / "logs" / "version_0" / "student"


@torch.no_grad()
@pytest.mark.parametrize("target", ["cpu", "disk"])
def test_an_offloaded_student_answers_as_before(folder, tmp_path, target):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, 30)[None]
    logits, answer = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    if target == "cpu":
        accelerate.cpu_offload(model, "cpu")
    else:
        accelerate.disk_offload(model, tmp_path / "offloaded", "cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), answer)


@torch.no_grad()
def test_a_device_map_puts_layers_on_disk(folder, tmp_path):
    ids = torch.arange(1, 30)[None]
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    device_map = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu"}
    device_map |= {f"transformer.h.{layer}": "disk" for layer in range(3)} | {"lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(model(ids).logits, logits)
