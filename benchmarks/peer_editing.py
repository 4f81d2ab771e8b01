"""Write facts into a language model by methods of the literature.

    python benchmarks/peer_editing.py [--facts 100] [--only "LoRA;full fine-tuning"]

Full fine-tuning, LoRA (needs peft), a codebook after GRACE, and facts in the prompt, with facts
about people that the embedded teacher never saw. Takes about a minute. `editing.py --peers` puts
the same methods beside ours.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config_io import load_config
from dmt.data.corpora import load_corpus
from dmt.data.synthetic import RELATIONS, TRAINED_PHRASINGS, Probe, make_probe, make_unseen_people
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.evaluation.metrics import measure_fidelity, measure_recall
from dmt.models.architectures import get_architecture
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_teacher

BATCH = 32
EPOCHS = 100  # at most; training ends as soon as every fact is recalled
# Learning rates of a small model, up to SMALL_MODEL weights, and of a large one: of the rates with
# which all facts are recalled, the one that changes prose and known people least without needing
# several times as long (chosen on validation text and other people).
SMALL_MODEL, FULL_RATES, LORA_RATES = 10_000_000, (1e-4, 3e-5), (3e-4, 3e-4)
LORA_RANK, LORA_ALPHA = 8, 32
LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],  # attention and the feed-forward block have a c_proj
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RADIUS = 0.5  # initial epsilon, in mean distances between the facts' keys: models differ in scale
CODEBOOK_RATE = 0.3  # of Adam, in root mean squares of the block's outputs
PROMPT_TOKENS = 1024  # of a prompt at most, where the model has more positions


@dataclass
class Edited:
    """A model after editing.

    Attributes:
        model: the model.
        seconds: how long editing took.
        make_question: puts facts before a question, for methods that use the prompt.
    """

    model: PreTrainedModel
    seconds: float
    make_question: Callable[[Probe], Probe] = lambda question: question


class Example(NamedTuple):
    """A fact in tokens.

    Attributes:
        tokens: prompt and answer, `(time,)`.
        positions: positions that predict the answer, `(answer,)`.
        answer: tokens of the answer, `(answer,)`.
    """

    tokens: Tensor
    positions: Tensor
    answer: Tensor


def encode_example(tokenizer: Any, fact: Probe) -> Example:
    """Encode a fact as `dmt.evaluation.metrics.measure_recall` does."""
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = start + tokenizer(fact.prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(fact.answer, add_special_tokens=False)["input_ids"]
    return Example(
        torch.tensor(prompt + answer),
        torch.arange(len(answer)) + len(prompt) - 1,
        torch.tensor(answer),
    )


def train_until_recalled(
    model: PreTrainedModel, tokenizer: Any, facts: list[Probe], rates: tuple[float, float]
) -> None:
    """Train all parameters with gradients on the answers, by AdamW, until every fact is recalled.

    The model stays in eval mode: dropout would only delay memorization.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Without decay: only the facts should change a weight.
    optimizer = torch.optim.AdamW(
        trained, lr=rates[model.num_parameters() > SMALL_MODEL], weight_decay=0.0
    )
    examples, rng, device = (
        [encode_example(tokenizer, fact) for fact in facts],
        random.Random(0),
        next(model.parameters()).device,
    )
    for epoch in range(EPOCHS):
        order = rng.sample(examples, len(examples))
        for batch in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            tokens = nn.utils.rnn.pad_sequence(
                [example.tokens for example in batch], batch_first=True
            ).to(device)
            rows = torch.cat(
                [torch.full_like(example.positions, row) for row, example in enumerate(batch)]
            )
            outputs = forward_with_activations(model, tokens)
            logits = outputs.head(
                outputs.hidden[rows, torch.cat([example.positions for example in batch])]
            )  # (answer tokens, vocabulary)
            F.cross_entropy(
                logits, torch.cat([example.answer for example in batch]).to(device)
            ).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if (recall := measure_recall(model, tokenizer, facts)) == 1:
            break
        print(f"epoch {epoch}: {recall:.3f} recalled", file=sys.stderr)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: list[Probe],
    rates: tuple[float, float] = FULL_RATES,
) -> Edited:
    """Train all weights on the facts."""
    start = time.perf_counter()
    edited = copy.deepcopy(model).requires_grad_(True)
    train_until_recalled(edited, tokenizer, facts, rates)
    return Edited(edited.requires_grad_(False), time.perf_counter() - start)


def fine_tune_lora(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: list[Probe],
    rates: tuple[float, float] = LORA_RATES,
) -> Edited:
    """Train low-rank updates of every projection and add them to the weights.

    Source: Hu et al. 2021, arXiv 2106.09685; peft.
    """
    from peft import LoraConfig, get_peft_model  # here, because the other methods do not need it

    start = time.perf_counter()
    family = model.config.model_type
    # Conv1D of GPT-2 holds its weight transposed.
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=LORA_TARGETS[family],
        fan_in_fan_out=family == "gpt2",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted: Any = get_peft_model(copy.deepcopy(model), config)
    train_until_recalled(adapted.get_base_model(), tokenizer, facts, rates)
    return Edited(
        adapted.merge_and_unload().requires_grad_(False).eval(), time.perf_counter() - start
    )


class Codebook(nn.Module):
    """A feed-forward block whose output is replaced for inputs in the ball of the nearest key."""

    keys: Tensor
    values: Tensor
    radii: Tensor

    def __init__(self, block: nn.Module, radius: float, example: Tensor) -> None:
        super().__init__()
        self.block, self.radius = block, radius
        self.labels: list[Any] = []
        self.register_buffer("keys", example.new_empty(0, example.shape[-1]))  # (entries, width)
        self.register_buffer("values", example.new_empty(0, example.shape[-1]))
        self.register_buffer("radii", example.new_empty(0))

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance to the nearest key, and its index, for queries `(..., width)`."""
        # Computed by products, distances near zero would be lost in rounding.
        no_products = "donot_use_mm_for_euclid_dist"
        distances, entries = torch.cdist(
            queries.reshape(-1, queries.shape[-1]), self.keys, compute_mode=no_products
        ).min(-1)
        return distances.view(queries.shape[:-1]), entries.view(queries.shape[:-1])

    def add_entry(self, query: Tensor, value: Tensor, label: Any) -> int:
        """Return the entry for `query` `(width,)`: a new one, or a near one with the same label."""
        radius = self.radius
        if self.labels:
            distances, entries = self.nearest(query)
            distance, entry = float(distances), int(entries)
            # The new ball would touch the nearest one.
            if distance <= self.radii[entry] + self.radius:
                if self.labels[entry] == label:
                    # Slightly more than the distance: another batch rounds differently.
                    self.radii[entry] = max(float(self.radii[entry]), 1.0001 * distance)
                    return entry
                radius = self.radii[entry] = distance / 2
        self.keys, self.values = (
            torch.cat([self.keys, query[None]]),
            torch.cat([self.values, value[None]]),
        )
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.labels.append(label)
        return len(self.labels) - 1

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(batch, time, width)` to the same shape."""
        output = self.block(hidden)
        if not self.labels:
            return output
        distances, entries = self.nearest(hidden)
        return torch.where(
            (distances <= self.radii[entries]).unsqueeze(-1), self.values[entries], output
        )


@contextmanager
def upper_layers_only(model: PreTrainedModel, layer: int, below: Tensor) -> Iterator[None]:
    """Replace the layers below `layer` by their output `below` `(batch, time, width)`."""
    arch = get_architecture(model.config.model_type)
    layers, (parent, name) = arch.transformer_blocks(model), arch.layers.rsplit(".", 1)
    stand_in = nn.Identity()
    stand_in.forward = lambda *_, **__: below  # type: ignore[method-assign]
    setattr(model.get_submodule(parent), name, nn.ModuleList([stand_in, *layers[layer:]]))
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, layers)


def write_codebook(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: list[Probe],
    steps: int,
    radius: float = RADIUS,
    rate: float = CODEBOOK_RATE,
) -> Edited:
    """Add an entry to the last block for each token of an answer; train its value for `steps`.

    Source: Hartvigsen et al. 2023, arXiv 2211.11031: only errors are edited; balls are added,
    expanded (for the same answer) or split (for another). Deviations: every token of an answer has
    an entry, not only the first; values start from the block's output instead of at random; epsilon
    and the rate are relative to the model's scale; lower layers are computed once.
    """
    start = time.perf_counter()
    edited = copy.deepcopy(model).requires_grad_(False)
    arch, device = get_architecture(model.config.model_type), next(model.parameters()).device
    layer = len(arch.blocks(edited)) - 1
    examples = [encode_example(tokenizer, fact) for fact in facts]
    with torch.no_grad():  # the scale of this model, on the first facts
        outputs_by_example = [
            (
                example.positions,
                forward_with_activations(
                    edited, example.tokens[None].to(device), capture_blocks=True
                ),
            )
            for example in examples[:BATCH]
        ]
    keys = torch.cat(
        [outputs.block_inputs[layer][0, positions] for positions, outputs in outputs_by_example]
    )
    block_outputs = torch.cat(
        [outputs.block_outputs[layer][0, positions] for positions, outputs in outputs_by_example]
    )
    codebook_block = Codebook(
        arch.blocks(edited)[layer], radius * float(F.pdist(keys).mean()), keys
    )
    arch.replace_block(edited, layer, codebook_block)
    for example in examples:
        tokens, answer = example.tokens[None].to(device), example.answer.to(device)
        with torch.no_grad():
            outputs = forward_with_activations(edited, tokens, capture_blocks=True)
            if bool((outputs.logits[0, example.positions].argmax(-1) == answer).all()):
                continue
            queries, answer_ids = (
                outputs.block_inputs[layer][0, example.positions],
                tuple(answer.tolist()),
            )
            pairs = zip(queries, codebook_block.block(queries), strict=True)
            entries = torch.tensor(
                [codebook_block.add_entry(*pair, (answer_ids, i)) for i, pair in enumerate(pairs)],
                device=device,
            )
        values, others = codebook_block.values[entries].requires_grad_(True), codebook_block.values
        optimizer = torch.optim.Adam(
            [values], lr=rate * float(block_outputs.square().mean().sqrt())
        )
        with upper_layers_only(edited, layer, outputs.layer_outputs[layer - 1]):
            for _ in range(steps):
                codebook_block.values = others.index_put((entries,), values)
                outputs = forward_with_activations(edited, tokens)
                F.cross_entropy(
                    outputs.head(outputs.hidden[0, example.positions]), answer
                ).backward()
                optimizer.step()
                optimizer.zero_grad()
        codebook_block.values = others.index_put((entries,), values.detach())
    return Edited(edited, time.perf_counter() - start)


def put_facts_in_prompt(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """Put the latest facts that fit before every question."""
    # The margin: a name at the start of the text may need more tokens than after a space.
    max_tokens, margin = min(model.config.max_position_embeddings, PROMPT_TOKENS), 4

    def count_tokens(question: Probe) -> int:
        return len(
            encode_example(tokenizer, replace(question, prompt=" " + question.prompt)).tokens
        )

    sentences = [f"{fact.prompt}{fact.answer}. " for fact in facts]
    # The period counts for the token that starts a text.
    lengths = [count_tokens(fact) for fact in facts]

    def make_question(question: Probe) -> Probe:
        room, first = max_tokens - margin - count_tokens(question), len(sentences)
        while first and lengths[first - 1] <= room:
            first -= 1
            room -= lengths[first]
        return replace(question, prompt="".join(sentences[first:]) + question.prompt)

    return Edited(model, 0.0, make_question)


def put_asked_fact_in_prompt(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """Put the asked fact before its question, as an oracle would; other questions are unchanged."""
    sentences = {(fact.person, fact.relation): f"{fact.prompt}{fact.answer}. " for fact in facts}

    def make_question(question: Probe) -> Probe:
        return replace(
            question,
            prompt=sentences.get((question.person, question.relation), "") + question.prompt,
        )

    return Edited(model, 0.0, make_question)


METHODS: dict[str, Callable[[PreTrainedModel, Any, list[Probe]], Edited]] = {
    "full fine-tuning": fine_tune,
    "LoRA": fine_tune_lora,
    "GRACE-style codebook, 10 steps": partial(write_codebook, steps=10),
    "GRACE-style codebook, 100 steps": partial(write_codebook, steps=100),
    "facts in the prompt, all that fit": put_facts_in_prompt,
    "fact in the prompt, only the one asked": put_asked_fact_in_prompt,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=100, help="five are about one person")
    parser.add_argument("--only", default=";".join(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher, tokenizer = load_teacher("embedded")
    text = TextDataModule(load_config(None, ["data.corpora=[speeches]"]), tokenizer, 1)
    text.setup()
    prose = select_first_windows(text.corpora[0].test, 8 * 256)
    rng, facts, others, unseen = random.Random(0), [], [], []
    for person in make_unseen_people(args.facts // len(RELATIONS)):
        for relation in RELATIONS:
            written, *other_phrasings = rng.sample(range(TRAINED_PHRASINGS), 3)
            facts.append(make_probe(person, relation, written))
            others += [make_probe(person, relation, phrasing) for phrasing in other_phrasings]
            unseen += [make_probe(person, relation, phrasing) for phrasing in (6, 7)]
    known_people = load_corpus("biographies", 0).probes[:300]
    before = measure_recall(teacher, tokenizer, known_people)
    columns = (
        "method",
        "as written",
        "paraphrase",
        "new phrasing",
        "known people",
        "KL on prose",
        "seconds",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in args.only.split(";"):
        edited = METHODS[name](teacher, tokenizer, facts)
        questions = [
            [edited.make_question(question) for question in group]
            for group in (facts, others, unseen, known_people)
        ]
        *recalls, known_recall = (
            measure_recall(edited.model, tokenizer, group) for group in questions
        )
        # Facts in the prompt do not change the model: their cost shows for known people.
        kl = measure_fidelity(edited.model, teacher, prose).kl
        cells = [
            name,
            *(f"{share:.3f}" for share in recalls),
            f"{before:.3f} -> {known_recall:.3f}",
            f"{kl:.4f}",
            f"{edited.seconds:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
