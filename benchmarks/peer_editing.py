"""Ways of the literature to teach a causal language model a list of facts: the peers of our own editing.

    python benchmarks/peer_editing.py [--facts 100] [--only "LoRA;full fine-tuning"]

Full fine-tuning, LoRA (needs peft), a codebook after GRACE, facts told in the prompt. The command line teaches the embedded
teacher facts about people it has never seen; it takes about a minute.
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
# Rates of a small model, up to SMALL weights, and of a large one. Of those with which all facts are recalled, the one that
# leaves prose and known people most alone without needing several times as long (tried on validation text, other people).
SMALL, FULL_RATES, LORA_RATES = 10_000_000, (1e-4, 3e-5), (3e-4, 3e-4)
LORA_RANK, LORA_ALPHA = 8, 32
LORA_TARGETS = {
    "gpt2": [
        "c_attn",
        "c_proj",
        "c_fc",
    ],  # c_proj is the name of two: of attention and of the feed-forward block
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RADIUS = (
    0.5  # initial epsilon, in mean distances between the facts' own keys: models differ in scale
)
CODEBOOK_RATE = 0.3  # Adam's, in root mean squares of the block's own outputs
PROMPT_TOKENS = 1024  # a prompt's most, where the model has more positions


@dataclass
class Edited:
    """A model that was taught facts, the seconds that took, and what to ask it instead of a question."""

    model: PreTrainedModel
    seconds: float
    prompt: Callable[[Probe], Probe] = lambda question: (
        question
    )  # another where facts are told in the prompt


class Lesson(NamedTuple):
    """A fact as tokens `(time,)`, the positions `(answer,)` that predict its answer, and the answer's tokens `(answer,)`."""

    tokens: Tensor
    places: Tensor
    answer: Tensor


def lesson(tokenizer: Any, fact: Probe) -> Lesson:
    """A fact in the tokens with which `dmt.evaluation.metrics.recall` asks for it."""
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = start + tokenizer(fact.prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(fact.answer, add_special_tokens=False)["input_ids"]
    return Lesson(
        torch.tensor(prompt + answer),
        torch.arange(len(answer)) + len(prompt) - 1,
        torch.tensor(answer),
    )


def train(
    model: PreTrainedModel, tokenizer: Any, facts: list[Probe], rates: tuple[float, float]
) -> None:
    """AdamW on the answers' tokens until every fact is recalled; whatever asks for a gradient is trained.

    The model stays in eval mode: dropout would only delay learning by heart.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Without decay: nothing but the facts should move a weight.
    optimizer = torch.optim.AdamW(
        trained, lr=rates[model.num_parameters() > SMALL], weight_decay=0.0
    )
    lessons, draw, device = (
        [lesson(tokenizer, fact) for fact in facts],
        random.Random(0),
        next(model.parameters()).device,
    )
    for epoch in range(EPOCHS):
        order = draw.sample(lessons, len(lessons))
        for batch in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            tokens = nn.utils.rnn.pad_sequence([one.tokens for one in batch], batch_first=True).to(
                device
            )
            rows = torch.cat([torch.full_like(one.places, row) for row, one in enumerate(batch)])
            said = forward_with_activations(model, tokens)
            logits = said.head(
                said.hidden[rows, torch.cat([one.places for one in batch])]
            )  # (answer tokens, vocabulary)
            F.cross_entropy(logits, torch.cat([one.answer for one in batch]).to(device)).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if (right := measure_recall(model, tokenizer, facts)) == 1:
            break
        print(f"epoch {epoch}: {right:.3f} recalled", file=sys.stderr)


def full(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: list[Probe],
    rates: tuple[float, float] = FULL_RATES,
) -> Edited:
    """All weights learn the facts."""
    began = time.perf_counter()
    edited = copy.deepcopy(model).requires_grad_(True)
    train(edited, tokenizer, facts, rates)
    return Edited(edited.requires_grad_(False), time.perf_counter() - began)


def lora(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: list[Probe],
    rates: tuple[float, float] = LORA_RATES,
) -> Edited:
    """Low-rank updates of every projection learn the facts and are then added to the weights.

    Source: Hu et al. 2021, arXiv 2106.09685; peft.
    """
    from peft import LoraConfig, get_peft_model  # lazy: the other methods do without

    began = time.perf_counter()
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
    # The model inside has the adapters in place already, under the names that `observe` knows.
    train(adapted.get_base_model(), tokenizer, facts, rates)
    return Edited(
        adapted.merge_and_unload().requires_grad_(False).eval(), time.perf_counter() - began
    )


class Codebook(nn.Module):
    """A feed-forward block whose answer is replaced wherever its input lies in the ball around the nearest key."""

    def __init__(self, block: nn.Module, radius: float, like: Tensor) -> None:
        super().__init__()
        self.block, self.radius = block, radius
        self.labels: list[Any] = []
        self.register_buffer("keys", like.new_empty(0, like.shape[-1]))  # (entries, width)
        self.register_buffer("values", like.new_empty(0, like.shape[-1]))
        self.register_buffer("radii", like.new_empty(0))

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest key and its number, for queries `(..., width)`."""
        # By products, distances near zero would be lost in rounding.
        exactly = "donot_use_mm_for_euclid_dist"
        distances, entries = torch.cdist(
            queries.reshape(-1, queries.shape[-1]), self.keys, compute_mode=exactly
        ).min(-1)
        return distances.view(queries.shape[:-1]), entries.view(queries.shape[:-1])

    def admit(self, query: Tensor, value: Tensor, label: Any) -> int:
        """Number of the entry that is to answer `query` `(width,)`: a new one, or one near by with the same label."""
        radius = self.radius
        if self.labels:
            distance, entry = (found.item() for found in self.nearest(query))
            if (
                distance <= self.radii[entry] + self.radius
            ):  # the new ball would touch the nearest one
                if self.labels[entry] == label:
                    # A hair more than the distance, which another batch rounds otherwise.
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
        """`(batch, time, width)` to the same."""
        answered = self.block(hidden)
        if not self.labels:
            return answered
        distances, entries = self.nearest(hidden)
        return torch.where(
            (distances <= self.radii[entries]).unsqueeze(-1), self.values[entries], answered
        )


@contextmanager
def upper_layers_only(model: PreTrainedModel, layer: int, below: Tensor) -> Iterator[None]:
    """Within, layers below `layer` are not computed: what they say is `below` `(batch, time, width)`."""
    arch = get_architecture(model.config.model_type)
    layers, (parent, name) = arch.transformer_blocks(model), arch.layers.rsplit(".", 1)
    stand_in = nn.Identity()
    stand_in.forward = lambda *_, **__: below  # type: ignore[method-assign]
    setattr(model.get_submodule(parent), name, nn.ModuleList([stand_in, *layers[layer:]]))
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, layers)


def codebook(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: list[Probe],
    steps: int,
    radius: float = RADIUS,
    rate: float = CODEBOOK_RATE,
) -> Edited:
    """An entry for each token of an answer in the last block, its value learnt in `steps` steps, one fact after the other.

    Source: Hartvigsen et al. 2023, arXiv 2211.11031: only errors are edited; balls are added, expanded (the same answer) or
    split (another). Departs in that every token of an answer has an entry, not only the first; values start from what the
    block says instead of at random; epsilon and rate are relative to the model's scale; lower layers are computed once.
    """
    began = time.perf_counter()
    edited = copy.deepcopy(model).requires_grad_(False)
    arch, device = get_architecture(model.config.model_type), next(model.parameters()).device
    layer = len(arch.blocks(edited)) - 1
    lessons = [lesson(tokenizer, fact) for fact in facts]
    with torch.no_grad():  # the scale of this model, on the first facts
        seen = [
            (
                one.places,
                forward_with_activations(edited, one.tokens[None].to(device), capture_blocks=True),
            )
            for one in lessons[:BATCH]
        ]
    keys = torch.cat([said.block_inputs[layer][0, places] for places, said in seen])
    answers = torch.cat([said.block_outputs[layer][0, places] for places, said in seen])
    book = Codebook(arch.blocks(edited)[layer], radius * float(F.pdist(keys).mean()), keys)
    arch.replace_block(edited, layer, book)
    for one in lessons:
        tokens, answer = one.tokens[None].to(device), one.answer.to(device)
        with torch.no_grad():
            said = forward_with_activations(edited, tokens, capture_blocks=True)
            if bool((said.logits[0, one.places].argmax(-1) == answer).all()):
                continue
            queries, whole = said.block_inputs[layer][0, one.places], tuple(answer.tolist())
            pairs = zip(queries, book.block(queries), strict=True)
            entries = torch.tensor(
                [book.admit(*pair, (whole, i)) for i, pair in enumerate(pairs)], device=device
            )
        learnt, others = book.values[entries].requires_grad_(True), book.values
        optimizer = torch.optim.Adam([learnt], lr=rate * float(answers.square().mean().sqrt()))
        with upper_layers_only(edited, layer, said.layer_outputs[layer - 1]):
            for _ in range(steps):
                book.values = others.index_put((entries,), learnt)
                said = forward_with_activations(edited, tokens)
                F.cross_entropy(said.head(said.hidden[0, one.places]), answer).backward()
                optimizer.step()
                optimizer.zero_grad()
        book.values = others.index_put((entries,), learnt.detach())
    return Edited(edited, time.perf_counter() - began)


def all_in_prompt(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """The facts are told before every question, the latest that fit; earlier ones, the asked one maybe, are lost."""
    # What the name that opens the text may take more than a name after a space.
    most, margin = min(model.config.max_position_embeddings, PROMPT_TOKENS), 4

    def length(question: Probe) -> int:
        return len(lesson(tokenizer, replace(question, prompt=" " + question.prompt)).tokens)

    told = [f"{fact.prompt}{fact.answer}. " for fact in facts]
    lengths = [
        length(fact) for fact in facts
    ]  # the full stop counts for the token that starts a text

    def prompt(question: Probe) -> Probe:
        room, first = most - margin - length(question), len(told)
        while first and lengths[first - 1] <= room:
            first -= 1
            room -= lengths[first]
        return replace(question, prompt="".join(told[first:]) + question.prompt)

    return Edited(model, 0.0, prompt)


def asked_in_prompt(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """Only the fact that is asked for is told before the question: an oracle that knows which; other questions stay alone."""
    told = {(fact.person, fact.relation): f"{fact.prompt}{fact.answer}. " for fact in facts}

    def prompt(question: Probe) -> Probe:
        return replace(
            question, prompt=told.get((question.person, question.relation), "") + question.prompt
        )

    return Edited(model, 0.0, prompt)


METHODS: dict[str, Callable[[PreTrainedModel, Any, list[Probe]], Edited]] = {
    "full fine-tuning": full,
    "LoRA": lora,
    "GRACE-style codebook, 10 steps": partial(codebook, steps=10),
    "GRACE-style codebook, 100 steps": partial(codebook, steps=100),
    "facts in the prompt, all that fit": all_in_prompt,
    "fact in the prompt, only the one asked": asked_in_prompt,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=100, help="five are about one person")
    parser.add_argument("--only", default=";".join(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, tokenizer = load_teacher("embedded")
    text = TextDataModule(load_config(None, ["data.corpora=[speeches]"]), tokenizer, 1)
    text.setup()
    prose = select_first_windows(text.corpora[0].test, 8 * 256)
    draw, facts, others, unseen = random.Random(0), [], [], []
    for person in make_unseen_people(options.facts // len(RELATIONS)):
        for relation in RELATIONS:
            written, *two = draw.sample(range(TRAINED_PHRASINGS), 3)
            facts.append(make_probe(person, relation, written))
            others += [make_probe(person, relation, phrasing) for phrasing in two]
            unseen += [make_probe(person, relation, phrasing) for phrasing in (6, 7)]
    known = load_corpus("biographies", 0).probes[:300]
    before = measure_recall(teacher, tokenizer, known)
    head = "method | written phrasing | two other phrasings | two unseen phrasings | known people | KL on prose | seconds"
    print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}")
    for name in options.only.split(";"):
        edited = METHODS[name](teacher, tokenizer, facts)
        asked = [
            [edited.prompt(question) for question in group]
            for group in (facts, others, unseen, known)
        ]
        *new, kept = (measure_recall(edited.model, tokenizer, group) for group in asked)
        # Facts in the prompt leave the model as it is: what they cost shows where other people are asked for.
        apart = measure_fidelity(edited.model, teacher, prose).kl
        cells = [
            name,
            *(f"{share:.3f}" for share in new),
            f"{before:.3f} -> {kept:.3f}",
            f"{apart:.4f}",
            f"{edited.seconds:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
