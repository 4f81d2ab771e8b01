"""Generation of one sequence: students against transformers' GPT-2, `python -m benchmarks.decode`.

Generating single tokens is bound by memory bandwidth. For the shapes of GPT-2 124M and 355M with
random weights, this prints milliseconds for each of 128 new tokens after a prompt of 16, with a
cache, and the ratio to dense; milliseconds for a prompt of 512; one block alone; and the largest
difference between the logits of a fast path and the reference. For the newest student of the
embedded teacher it prints recall and KL of each search. Variants are interleaved, with medians of
three repeats.

`limit` is the ratio of bytes read, all else equal. `dense, oneDNN` is the dense model with the
products of `dmt.ops`, which are faster than torch's own on processors that are not Intel's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmarks.tables import Row, medians, newest_student, table
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import dmt
from dmt import ops
from dmt.config import FeaturalConfig
from dmt.data.corpora import load_corpus
from dmt.data.windows import select_first_windows, tokenize_corpus
from dmt.evaluation.metrics import measure_fidelity
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_teacher
from dmt.models.memories import get_featural_memories
from dmt.ops import use_onednn_linear
from dmt.training.trainer import silence_libraries

assert dmt  # registers students with transformers

SHAPES = {
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "355M": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512},
}
PROMPT, NEW, PREFILL = 16, 128, 512
VARIANTS = {
    "exact, float32 keys": ("exact", False),
    "exact, linear map": ("exact", True),
    "int8 keys": ("int8", False),
    "ivf": ("ivf", False),
}


def build_models(
    shape: str, variants: tuple[str, ...] = tuple(VARIANTS), k: int = 32
) -> dict[str, Any]:
    """Return the dense model and students that read `k` slots, all with the same weights."""
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(
        GPT2Config(**SHAPES[shape], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ).eval()
    dense.requires_grad_(False)
    quick = GPT2LMHeadModel(dense.config)
    quick.load_state_dict(dense.state_dict())
    models_by_name: dict[str, Any] = {
        "dense (transformers)": dense,
        "dense, oneDNN": use_onednn_linear(quick).eval().requires_grad_(False),
    }
    for name in variants:
        search, linear = VARIANTS[name]
        memory = FeaturalConfig(k=k, search=search, skip_connection=linear, metric="euclidean")
        student = convert_blocks(dense, [memory] * dense.config.n_layer)[0].requires_grad_(False)
        state = dict(dense.named_parameters())
        for (
            parameter,
            student_parameter,
        ) in student.named_parameters():  # share equal weights to save memory
            if parameter in state and state[parameter].shape == student_parameter.shape:
                student_parameter.data = state[parameter].data
        models_by_name[name] = student
    return models_by_name


def limit(config: Any, name: str) -> float:
    """Return the ratio of bytes read per token, dense model to variant."""
    width, layers, vocabulary = config.n_embd, config.n_layer, config.vocab_size
    always = 4 * (layers * 4 * width**2 + vocabulary * width)
    block = 4 * 8 * width**2
    read = {
        "exact, float32 keys": 16 * width**2,
        "exact, linear map": 20 * width**2,
        "int8 keys": 4 * width**2,
    }
    return (
        (always + layers * block) / (always + layers * read.get(name, 0))
        if not name.startswith("dense")
        else 1.0
    )


def generate(model: Any, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Continue a prompt greedily with a cache."""
    with torch.no_grad():
        return model.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


def speed(
    shape: str, repeats: int, variants: tuple[str, ...] = tuple(VARIANTS), k: int = 32
) -> list[Row]:
    """Return a row for each variant: milliseconds per token, prompt and block, and ratios."""
    models_by_name = build_models(shape, variants, k)
    vocabulary = next(iter(models_by_name.values())).config.vocab_size
    prompt, longer = (
        torch.randint(0, vocabulary, (1, PROMPT)),
        torch.randint(0, vocabulary, (1, PREFILL)),
    )

    def prefill(model: Any) -> None:
        with torch.no_grad():
            model(longer, use_cache=True, logits_to_keep=1)

    tokens = medians(
        {name: lambda m=model: generate(m, prompt, NEW) for name, model in models_by_name.items()},
        repeats,
    )
    first = medians(
        {name: lambda m=model: generate(m, prompt, 1) for name, model in models_by_name.items()},
        repeats,
    )
    prompts = medians(
        {name: lambda m=model: prefill(m) for name, model in models_by_name.items()}, repeats
    )
    hidden = torch.randn(1, models_by_name["dense (transformers)"].config.n_embd)

    def run_blocks(model: Any) -> None:
        with torch.no_grad():  # one block after the other, so that none is in the processor's cache
            for layer in model.transformer.h:
                layer.mlp(hidden)

    blocks = medians(
        {name: lambda m=model: run_blocks(m) for name, model in models_by_name.items()},
        10 * repeats,
    )
    rows = []
    dense = next(iter(models_by_name))
    seconds = {name: (tokens[name] - first[name]) / (NEW - 1) for name in models_by_name}
    for name, model in models_by_name.items():
        rows.append(
            {
                "shape": shape,
                "variant": name,
                "ms a token": 1e3 * seconds[name],
                "times as fast": seconds[dense] / seconds[name],
                "limit": limit(model.config, name),
                "ms a prompt": 1e3 * prompts[name],
                "prompt, times as fast": prompts[dense] / prompts[name],
                "us a block": 1e6 * blocks[name] / model.config.n_layer,
                "block, times as fast": blocks[dense] / blocks[name],
                "logits differ by": differences(model),
            }
        )
    return rows


def differences(model: Any, tokens: int = 24) -> float:
    """Return the largest difference between logits of single tokens (fast paths) and of all."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    cache, logits = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            answer = model(token, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            logits.append(answer.logits)
    before, ops.gemm_library = ops.gemm_library, "torch"
    searches = (
        {memory: memory.search for memory in get_featural_memories(model).values()}
        if hasattr(model.config, "memory")
        else {}
    )
    for memory in searches:
        memory.search = "exact"
    try:
        expected = model(
            ids
        ).logits.detach()  # with gradients enabled, every slot is scored and none is gathered
    finally:
        ops.gemm_library = before
        for memory, search in searches.items():
            memory.search = search
    return float((torch.cat(logits, dim=1) - expected).abs().max())


def fidelity(student: Path, tokens: int = 16_384) -> list[Row]:
    """Return recall and KL on speeches of each search on a student of the embedded teacher."""
    teacher, tokenizer = load_teacher("embedded")
    windows = select_first_windows(
        tokenize_corpus(load_corpus("speeches", 0), tokenizer, 256).test, tokens
    )
    model = AutoModelForCausalLM.from_pretrained(student).eval().requires_grad_(False)
    block_inputs = forward_with_activations(model, windows[:8], capture_blocks=True).block_inputs
    rows = []
    for search in ("exact", "int8", "ivf"):
        recalls = []
        for layer, memory in get_featural_memories(model).items():
            memory.search = search
            recalls.append(memory.measure_recall(block_inputs[layer].flatten(0, 1)))
        metrics = measure_fidelity(model, teacher, windows, 8)
        rows.append(
            {
                "search": search,
                "recall": sum(recalls) / len(recalls),
                "KL": metrics.kl,
                "ppl_ratio": metrics.ppl_ratio,
            }
        )
        for memory in get_featural_memories(model).values():
            memory.search = "exact"
    return rows


def figures(quick: bool = False) -> list[Row]:
    """Measure both shapes, and the searches of the newest distilled student if there is one."""
    silence_libraries()
    rows = [row for shape in (["tiny"] if quick else ["124M", "355M"]) for row in speed(shape, 3)]
    student = newest_student()
    return rows + (fidelity(student, 2_048 if quick else 16_384) if student else [])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["124M", "355M"], choices=SHAPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--k", type=int, default=32, help="slots that a token reads")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--student",
        type=Path,
        help="a distilled student of the embedded teacher, for recall and KL",
    )
    parser.add_argument("--tokens", type=int, default=16_384, help="on which KL is measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_libraries()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"products by {ops.gemm_library}"
    )
    for shape in args.shapes:
        print(table(speed(shape, args.repeats, tuple(args.variants), args.k)), flush=True)
    if args.student:
        print(table(fidelity(args.student, args.tokens)), flush=True)


if __name__ == "__main__":
    main()
