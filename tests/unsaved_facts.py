"""Facts that are in memory only, attached to tiny models without fitting a matcher."""

import torch
from conftest import WIDTH
from torch.nn.functional import normalize

from dmt.data.tokenizer import get_prefix_ids
from dmt.matching.relations import RATES, RelationMatcher, StateSpace, list_bank_clauses
from dmt.models.fact_hooks import FactHooks, attach, record_matches
from dmt.models.fact_matching import TextCodec
from dmt.store.fact_index import FactIndex
from dmt.store.records import FactRecord, StoredFact

BORN = "Ada Holbrook was born in the town of"
ANSWER = " Ravenhill"
THRESHOLD = 4.0  # decades
# Scores of words and of states: a clause with all words of a prompt matches whatever its state is,
# one with two thirds of their weight never does.
WORDS, STATES, NEVER = (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, -1.0)
LOWEST_MATCH = 0.75


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make_relations(width=WIDTH, weights=(WORDS, NEVER, NEVER), lowest_match=LOWEST_MATCH):
    """Make a matcher with random states of the bank."""
    generator = torch.Generator().manual_seed(0)
    space = StateSpace(
        torch.zeros(width),
        torch.eye(width),
        torch.zeros(width),
        normalize(torch.randn(len(list_bank_clauses()), width, generator=generator), dim=-1),
    )
    return RelationMatcher(
        space,
        torch.tensor(weights),
        torch.linspace(lowest_match, -1, len(RATES)).expand(3, -1).contiguous(),
        torch.zeros(width + 1),
        torch.zeros(3),  # every clause is complete
    )


def make_fact(tokenizer, prompt=BORN, answer=ANSWER, subject="Ada Holbrook", fact_id=1, scale=8.0):
    """Make a fact with random rows; the IDs of its rows begin at a hundred times its own."""
    answer_ids = tuple(encode(tokenizer, answer))
    generator = torch.Generator().manual_seed(fact_id)
    keys, values = torch.randn(2, len(answer_ids), WIDTH, generator=generator).numpy()
    record = FactRecord(
        fact_id,
        prompt,
        answer,
        subject,
        "",
        "",
        float(fact_id),
        answer_ids,
        tuple(100 * fact_id + position for position in range(len(answer_ids))),
        (THRESHOLD,) * len(answer_ids),
    )
    return StoredFact(record, keys, scale * values)


def make_hooks(tokenizer, facts, key_layer=1, value_layer=2, relations=None):
    index = FactIndex()
    index.set_unsaved(facts)
    return FactHooks(
        index,
        make_relations() if relations is None else relations,
        TextCodec.from_transformers(tokenizer, get_prefix_ids(tokenizer)),
        key_layer,
        value_layer,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    )


def attach_facts(model, tokenizer, facts=None, **options):
    """Attach facts to a model; the one of `make_fact` where none are passed."""
    hooks = make_hooks(tokenizer, [make_fact(tokenizer)] if facts is None else facts, **options)
    attach(model, hooks)
    return hooks


def read_matches(model, ids, **arguments):
    """Run one pass; return `{token: (fact ID, position in the answer)}`."""
    with record_matches(model) as passes, torch.no_grad():
        model(torch.as_tensor(ids).reshape(-1, torch.as_tensor(ids).shape[-1]), **arguments)
    (matches,) = passes
    return {match.token: (match.fact.id, match.position) for match in matches}
