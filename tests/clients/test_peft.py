"""peft: a LoRA adapter on a student is trained, saved, loaded, and merged."""

import pytest
import torch
from conftest import SENTENCES
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")


def train(model, tokenizer, steps=12):
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [
        {},  # the default of the family
        {"target_modules": "all-linear"},  # of attention: memories are no linear layers
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]},  # memories are trained whole
        {"target_modules": [], "target_parameters": ["mlp.values", "mlp.keys"]},
    ],
    ids=["default", "all-linear", "named", "memories", "slots"],
)
def test_an_adapter_is_trained_saved_and_merged(
    student, student_folder, student_tokenizer, measure_loss, tmp_path, settings
):
    start, ids = measure_loss(student), torch.arange(1, 20)[None]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(student, config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".mlp." in name for name in trained) == bool(
        {"modules_to_save", "target_parameters"} & settings.keys()
    )
    train(model, student_tokenizer)
    assert measure_loss(model) < 0.95 * start
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(student_folder)
        for name, value in base.state_dict().items():
            assert torch.equal(value, before[name]), name
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, logits)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-4)
