"""What tests/test_second_device.py runs on a second device: `python device_cases.py DEVICE CASE`.

Each case is a function that prints one JSON value; its arguments are those of the command line.
The device is installed first, because it patches torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import second_device

if __name__ == "__main__":
    second_device.install(sys.argv[1])

import json

import torch
from transformers import AutoModelForCausalLM

import dmt  # noqa: F401  # registers the students

PROMPT = [[5, 6, 7, 8, 9, 10]]
# A map that leaves one layer's weights on the CPU; accelerate moves them for each pass.
OFFLOADED_LAYER = {
    **dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.drop", "lm_head"), 0),
    **dict.fromkeys(("transformer.h.0", "transformer.h.2", "transformer.ln_f"), 0),
    "transformer.h.1": "cpu",
}


def generate(model, prompt=PROMPT, max_new_tokens=8):
    """Return the most likely continuation."""
    ids = torch.tensor(prompt).to(model.get_output_embeddings().weight.device)
    output = model.generate(
        ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    return output.cpu().tolist()


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def load_with_default_device(folder):
    torch.set_default_device("cuda")
    try:
        model = load(folder)
        return generate(model)
    finally:
        torch.set_default_device(None)


def move_back(model):
    generate(model.to("cuda"))
    return generate(model.cpu())


def cast_after_use(model):
    """Cast a used model to half precision on both devices; return its tokens in float32 again."""
    for device in ("cpu", "cuda"):
        model.to(device)
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
            generate(model.to(dtype))
    return generate(model.float())


def load_students(*folders):
    """Load students in every way; print which do not continue as on the CPU."""
    different = []
    for folder in folders:
        expected = generate(load(folder))
        outputs = {
            "to": generate(load(folder).to("cuda")),
            "device_map": generate(load(folder, device_map="cuda")),
            "offloaded": generate(load(folder, device_map=OFFLOADED_LAYER)),
            "default device": load_with_default_device(folder),
            "moved back": move_back(load(folder)),
        }
        different += [f"{folder}: {way}" for way in outputs if outputs[way] != expected]
        cast_after_use(load(folder))  # float16 rounds weights for good, so tokens may differ
    return different


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[2]](*sys.argv[3:])))
