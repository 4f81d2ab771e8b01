"""Compare methods of compressing the embedded teacher: same teacher, tokens, windows, slots and k.

    python benchmarks/fidelity.py [--steps 1400] [--seeds 0] [--only "name;name"] [--threads 2]

Every student is trained on `steps` x 2,048 tokens in the same order and measured on the same test
text. Takes about an hour. Rows of sparsify (EleutherAI) need its package, which is installed from
the package index into a virtual environment under the temporary folder.

The dense students use as many weights per token as ours: k slots (a key and a value each) and the
linear map are `k + width / 2` neurons; with all keys that exact search scores they are
`(slots + k + width) / 2`. They are the teacher's most important neurons, the others merged into
them. The student with fewer layers follows DistilGPT2: every other layer of the teacher, KL at
temperature 2, cross-entropy and cosine in its proportions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import HEAD, ROOT, cells, distill
from transformers import GPT2Config, GPT2LMHeadModel

from dmt.config import Config
from dmt.config_io import load_config
from dmt.data.windows import TextDataModule
from dmt.distillation.losses import (
    Batch,
    LossConfig,
    LossScales,
    compute_loss_terms,
    sum_weighted_terms,
)
from dmt.distillation.run import evaluate_student
from dmt.models.forward import forward_teacher, forward_with_activations
from dmt.models.loading import load_teacher
from dmt.training.optimization import build_adamw, lr_schedule
from dmt.training.trainer import keep_freed_memory, silence_libraries

SPARSIFY = [
    "eai-sparsify==1.3.3",
    "schedulefree",
    "simple-parsing",
    "natsort",
    "einops",
    "datasets",
    "accelerate",
]


def distill_with(
    *settings: str, config: str = "configs/default.yaml"
) -> Callable[..., dict[str, Any]]:
    """Return a method that runs `distill.py` with these settings."""

    def train(steps: int, seed: int, threads: int, scratch: Path) -> dict[str, Any]:
        return distill(settings, steps, seed, threads, config)

    return train


def fewer_layers(steps: int, seed: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Train a student with every other layer of the teacher, as DistilGPT2 does."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config, teacher, tokenizer, data = _load_inputs(steps, seed)
    layers = list(range(0, teacher.config.n_layer, 2))
    student = GPT2LMHeadModel(GPT2Config(**{**teacher.config.to_dict(), "n_layer": len(layers)}))
    weights = teacher.state_dict()
    for name in student.state_dict():
        source = name
        if name.startswith("transformer.h."):
            _, _, layer, rest = name.split(".", 3)
            source = f"transformer.h.{layers[int(layer)]}.{rest}"
        student.state_dict()[name].copy_(weights[source])
    loss = LossConfig(
        kl=5 / 8, ce=2 / 8, hidden_cosine=1 / 8, temperature=2.0, hidden_mse=0, block_fvu=0
    )
    optimizer = build_adamw(student.parameters(), config.optim)
    for step, tokens in enumerate(data.train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = lr_schedule(step, steps, config.stages.end_to_end_lr, config.optim)
        with torch.autocast("cpu", torch.bfloat16):
            batch = Batch.full_step(tokens)
            terms = compute_loss_terms(
                forward_with_activations(student, tokens),
                forward_teacher(teacher, tokens),
                batch,
                loss,
                LossScales(torch.ones(1), torch.ones(())),
            )
        sum_weighted_terms(terms, loss).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return evaluate_student(config, student.eval(), teacher, tokenizer, data)


def sparsify(*stages: str, optimizer: str = "signum") -> Callable[..., dict[str, Any]]:
    """Return a method that trains EleutherAI's transcoders with skip connections.

    Each loss of `stages` gets an equal part of the steps. Each optimizer has the default learning
    rate of the package. Adam warms up in 20 steps, as ours does, and not in the package's 1,000,
    which are more than there are.
    """

    def train(steps: int, seed: int, threads: int, scratch: Path) -> dict[str, Any]:
        python = sparsify_python()
        config, teacher, tokenizer, data = _load_inputs(steps, seed)
        torch.save(torch.cat(list(data.train_dataloader())), scratch / "windows.pt")
        for number, loss in enumerate(stages):
            task = {
                "windows": str(scratch / "windows.pt"),
                "loss": loss,
                "part": [number, len(stages)],
                "k": 32,
                "slots": 512,
                "seed": seed,
                "threads": threads,
                "optimizer": optimizer,
                "batch": config.data.batch_size,
                "out": str(scratch / str(number)),
                "start": str(scratch / str(number - 1) / "coders") if number else None,
            }
            command = [python, str(ROOT / "benchmarks" / "peer_sparsify.py"), json.dumps(task)]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                raise SystemExit(f"sparsify, {loss}: {process.stderr.strip().splitlines()[-1]}")
        coders = torch.load(scratch / str(len(stages) - 1) / "outputs.pt", weights_only=True)
        student = GPT2LMHeadModel(teacher.config).eval()
        student.load_state_dict(teacher.state_dict())
        for layer, coder in coders.items():
            student.transformer.h[layer].mlp = _Transcoder(**coder)
        return evaluate_student(config, student, teacher, tokenizer, data)

    return train


def sparsify_python() -> Path:
    """Return the interpreter of an environment with sparsify, created if missing.

    It can also import the packages of this environment.
    """
    home = Path(tempfile.gettempdir()) / "dmt-sparsify"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", SPARSIFY[0]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *SPARSIFY[1:]], check=True)
        (home / "ready").touch()
    site_packages = next((home / "lib").glob("python*/site-packages"))
    (site_packages / "outer.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("site-packages")) + f"\n{ROOT / 'src'}\n"
    )
    return python


class _Transcoder(torch.nn.Module):
    """A trained transcoder: top-k of relu(xE + b), times the decoder, plus skip and bias."""

    def __init__(
        self, encoder: Any, bias: Any, decoder: Any, output_bias: Any, skip: Any, k: int
    ) -> None:
        super().__init__()
        self.parts, self.k = (encoder, bias, decoder, output_bias, skip), k

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        encoder, bias, decoder, output_bias, skip = self.parts
        scores = torch.relu(hidden @ encoder.t() + bias)
        best = scores.topk(self.k, dim=-1)
        top = torch.zeros_like(scores).scatter(-1, best.indices, best.values)
        return top @ decoder + output_bias + hidden @ skip.t()


def _load_inputs(steps: int, seed: int) -> tuple[Config, Any, Any, TextDataModule]:
    silence_libraries()
    keep_freed_memory()
    config = load_config(None, [f"seed={seed}"])
    teacher, tokenizer = load_teacher(config.teacher)
    data = TextDataModule(config, tokenizer, steps)
    data.setup()
    return config, teacher, tokenizer, data


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "ours, default": distill_with(),
    "ours, k: auto, mean 32": distill_with("memory.mean_k=32"),
    "ours, centered ranking": distill_with("memory.mean_k=32", "memory.selection=centered"),
    "ours, k = 32 for each token": distill_with("memory.k=32"),
    "ours, k: auto, no linear map": distill_with(
        "memory.mean_k=32", "memory.skip_connection=false"
    ),
    "ours, memories alone trained": distill_with("memory.mean_k=32", "student.trainable=memory"),
    "seed.yaml": distill_with(config="configs/seed.yaml"),
    "dense, 96 neurons": distill_with(
        "memory.num_slots=96",
        "memory.k=96",
        "memory.selection=score",
        "memory.skip_connection=false",
        "loss.hidden_mse=1",
        "loss.block_fvu=1",
    ),
    "dense, 336 neurons (search counted)": distill_with(
        "memory.num_slots=336",
        "memory.k=336",
        "memory.selection=score",
        "memory.skip_connection=false",
        "loss.hidden_mse=1",
        "loss.block_fvu=1",
    ),
    "every other layer": fewer_layers,
    "sparsify, fvu": sparsify("fvu"),
    "sparsify, fvu, Adam": sparsify("fvu", optimizer="adam"),
    "sparsify, fvu then kl": sparsify("fvu", "kl"),
    "sparsify, fvu then kl, Adam": sparsify("fvu", "kl", optimizer="adam"),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", default="", help=f"names, separated by `;`, of: {'; '.join(METHODS)}"
    )
    options = parser.parse_args()
    chosen = [name.strip() for name in options.only.split(";")] if options.only else list(METHODS)
    if unknown := sorted(set(chosen) - set(METHODS)):
        parser.error(
            f"--only: no method is called {'; '.join(unknown)}; there are {'; '.join(METHODS)}"
        )
    if any(name.startswith("sparsify") for name in chosen):
        sparsify_python()  # before any clock runs
    print(f"{options.steps:,} steps of 2,048 tokens; KL in nats per token")
    print(f"| method | seed | {HEAD} |\n|{'---|' * (HEAD.count('|') + 3)}")
    for name in chosen:
        for seed in map(int, options.seeds.split(",")):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                results = METHODS[name](options.steps, seed, options.threads, Path(scratch))
            print(
                f"| {name} | {seed} | {cells({'wall': time.perf_counter() - start, **results})} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
