"""Train EleutherAI's transcoders on the embedded teacher; `fidelity.py` runs this with sparsify."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_model
from sparsify import SparseCoderConfig, TrainConfig, Trainer

from dmt.models.loading import load_teacher


def main(task: dict[str, Any]) -> None:
    """Train and save one stage.

    Args:
        task: arguments from `fidelity.py`.
    """
    torch.set_num_threads(task["threads"])
    teacher, _ = load_teacher("embedded")
    windows = torch.load(task["windows"], weights_only=True)
    part, parts = task["part"]
    own_windows = windows[len(windows) * part // parts : len(windows) * (part + 1) // parts]
    dataset = Dataset.from_dict({"input_ids": own_windows.tolist()}).with_format("torch")
    coder = SparseCoderConfig(
        num_latents=task["slots"], k=task["k"], transcode=True, skip_connection=True
    )
    config = TrainConfig(
        coder,
        batch_size=task["batch"],
        loss_fn=task["loss"],
        hookpoints=["h.*.mlp"],
        optimizer=task["optimizer"],
        lr_warmup_steps=20,
        init_seeds=[task["seed"]],
        finetune=task["start"],
        log_to_wandb=False,
        save_dir=task["out"],
        run_name="coders",
    )
    trainer = Trainer(config, dataset, teacher)
    for name, sae in trainer.saes.items():
        if task["start"]:
            load_model(sae, str(Path(task["start"]) / name / "sae.safetensors"))
    trainer.fit()
    outputs = {}
    for name, sae in trainer.saes.items():
        # Load the saved weights: the optimizer has averages, and saves those.
        load_model(sae, str(Path(task["out"]) / "coders" / name / "sae.safetensors"))
        outputs[int(name.split(".")[1])] = {
            "encoder": sae.encoder.weight.detach(),
            "bias": sae.encoder.bias.detach(),
            "decoder": sae.W_dec.detach(),
            "output_bias": sae.b_dec.detach(),
            "skip": sae.W_skip.detach(),
            "k": task["k"],
        }
    torch.save(outputs, Path(task["out"]) / "outputs.pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
