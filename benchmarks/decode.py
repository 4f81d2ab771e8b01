"""Generation, one sequence at a time: students against transformers' own dense GPT-2, `python -m benchmarks.decode`.

A token generated alone is bound by the bytes that are read for it. Prints, for the shapes of GPT-2 124M and 355M (random
weights: speed does not depend on what they say), milliseconds for each of 128 new tokens after a prompt of 16, with a cache,
and the ratio to dense; milliseconds for a prompt of 512; one block alone; the largest difference between a fast path's logits
and the reference's; and for the embedded student of a run, what each search costs in recall and KL. Variants take
turns, medians of three repeats.

`limit` is the ratio of bytes read, all else equal. `dense, oneDNN` is the dense model with the products of
`dmt.memory.products`, which on processors that are not Intel's are faster than torch's own.
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
from dmt.memory import featural
from dmt.models.conversion import convert_blocks, get_featural_memories
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_teacher
from dmt.ops import use_onednn_linear
from dmt.training.trainer import silence_libraries

assert dmt  # makes students known to transformers

SHAPES = {
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "355M": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512},
}
K = 32
PROMPT, NEW, PREFILL = 16, 128, 512
VARIANTS = {
    "exact, float32 keys": ("exact", False),
    "exact, linear map": ("exact", True),
    "int8 keys": ("int8", False),
    "ivf": ("ivf", False),
}


def models(shape: str, variants: tuple[str, ...] = tuple(VARIANTS)) -> dict[str, Any]:
    """The dense model and the students, all with the same weights."""
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(
        GPT2Config(**SHAPES[shape], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ).eval()
    dense.requires_grad_(False)
    quick = GPT2LMHeadModel(dense.config)
    quick.load_state_dict(dense.state_dict())
    found: dict[str, Any] = {
        "dense (transformers)": dense,
        "dense, oneDNN": use_onednn_linear(quick).eval().requires_grad_(False),
    }
    for name in variants:
        search, linear = VARIANTS[name]
        memory = FeaturalConfig(k=K, search=search, skip_connection=linear, metric="euclidean")
        student = convert_blocks(dense, [memory] * dense.config.n_layer)[0].requires_grad_(False)
        state = dict(dense.named_parameters())
        for (
            parameter,
            mine,
        ) in student.named_parameters():  # one copy of what both have: less to hold, nothing else
            if parameter in state and state[parameter].shape == mine.shape:
                mine.data = state[parameter].data
        found[name] = student
    return found


def limit(config: Any, name: str) -> float:
    """Ratio of the bytes that a token reads in the dense model to those it reads in the variant."""
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
    """Greedy continuation with a cache."""
    with torch.no_grad():
        return model.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


def speed(shape: str, repeats: int, variants: tuple[str, ...] = tuple(VARIANTS)) -> list[Row]:
    """A row for each variant: milliseconds a token, for a prompt, for a block alone, ratios and differences."""
    found = models(shape, variants)
    vocabulary = next(iter(found.values())).config.vocab_size
    prompt, longer = (
        torch.randint(0, vocabulary, (1, PROMPT)),
        torch.randint(0, vocabulary, (1, PREFILL)),
    )

    def filled(model: Any) -> None:
        with torch.no_grad():
            model(longer, use_cache=True, logits_to_keep=1)

    tokens = medians(
        {name: lambda m=model: generate(m, prompt, NEW) for name, model in found.items()}, repeats
    )
    first = medians(
        {name: lambda m=model: generate(m, prompt, 1) for name, model in found.items()}, repeats
    )
    prompts = medians({name: lambda m=model: filled(m) for name, model in found.items()}, repeats)
    hidden = torch.randn(1, found["dense (transformers)"].config.n_embd)

    def through(model: Any) -> None:
        with (
            torch.no_grad()
        ):  # one block after the other, so that none is found in the processor's cache
            for layer in model.transformer.h:
                layer.mlp(hidden)

    blocks = medians(
        {name: lambda m=model: through(m) for name, model in found.items()}, 10 * repeats
    )
    rows = []
    dense = next(iter(found))
    each = {name: (tokens[name] - first[name]) / (NEW - 1) for name in found}
    for name, model in found.items():
        rows.append(
            {
                "shape": shape,
                "variant": name,
                "ms a token": 1e3 * each[name],
                "times as fast": each[dense] / each[name],
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
    """Largest difference between the logits of tokens one by one, by the fast paths, and of all at once by the plain ones."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    cache, said = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            answer = model(token, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            said.append(answer.logits)
    before, ops.gemm_library = ops.gemm_library, "torch"
    searches = (
        {memory: memory.search for memory in get_featural_memories(model).values()}
        if hasattr(model.config, "memory")
        else {}
    )
    for memory in searches:
        memory.search = "exact"
    try:
        wanted = model(
            ids
        ).logits.detach()  # with gradients enabled: every slot is scored, none is gathered
    finally:
        ops.gemm_library = before
        for memory, search in searches.items():
            memory.search = search
    return float((torch.cat(said, dim=1) - wanted).abs().max())


def fidelity(student: Path, tokens: int = 16_384) -> list[Row]:
    """A row for each search on a distilled student of the embedded teacher: recall, KL on speeches, slots looked at."""
    teacher, tokenizer = load_teacher("embedded")
    windows = select_first_windows(
        tokenize_corpus(load_corpus("speeches", 0), tokenizer, 256).test, tokens
    )
    model = AutoModelForCausalLM.from_pretrained(student).eval().requires_grad_(False)
    given = forward_with_activations(model, windows[:8], capture_blocks=True).block_inputs
    together, featural.MIN_BATCH_TOKENS = (
        featural.MIN_BATCH_TOKENS,
        1 << 40,
    )  # candidates for whole windows too, as a token alone would have
    rows = []
    try:
        for search in ("exact", "int8", "ivf"):
            recalls = []
            for layer, memory in get_featural_memories(model).items():
                memory.search = search
                recalls.append(memory.measure_recall(given[layer].flatten(0, 1)))
            tally = measure_fidelity(model, teacher, windows, 8)
            rows.append(
                {
                    "search": search,
                    "recall": sum(recalls) / len(recalls),
                    "KL": tally.kl,
                    "ppl_ratio": tally.ppl_ratio,
                }
            )
            for memory in get_featural_memories(model).values():
                memory.search = "exact"
    finally:
        featural.MIN_BATCH_TOKENS = together
    return rows


def figures(quick: bool = False) -> list[Row]:
    """Both shapes; with the newest distilled student of `lightning_logs`, where there is one, what searches cost it."""
    silence_libraries()
    rows = [row for shape in (["tiny"] if quick else ["124M", "355M"]) for row in speed(shape, 3)]
    student = newest_student()
    return rows + (fidelity(student, 2_048 if quick else 16_384) if student else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["124M", "355M"], choices=SHAPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--student",
        type=Path,
        help="a distilled student of the embedded teacher, for recall and KL",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    silence_libraries()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, products by {ops.gemm_library}"
    )
    for shape in given.shapes:
        print(table(speed(shape, given.repeats, tuple(given.variants))), flush=True)
    if given.student:
        print(table(fidelity(given.student)), flush=True)


if __name__ == "__main__":
    main()
