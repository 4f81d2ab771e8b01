"""K-FAC coordinates and the states that retrieve rows."""

import pytest
import torch
from conftest import LAYERS, make_teacher
from test_fact_store import WIDE, make_fact_model

from dmt.config import AssociativeConfig, FeaturalConfig
from dmt.consolidation.slot_training import KFACParameters, RowQueries, inverse_sqrt_factor
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.memories import get_associative_memories, get_featural_memories
from dmt.store.records import RowInsert

DAMPING = 0.001


def test_reconstructed_states_retrieve_their_rows(tokenizer):
    model, _ = convert_blocks(
        make_fact_model(make_teacher, tokenizer), [AssociativeConfig(k=4)] * LAYERS
    )
    memory = get_associative_memories(model)[2]
    torch.nn.init.normal_(memory.key.weight, std=0.1)
    memory.query.load_state_dict(memory.key.state_dict())
    hidden = torch.randn(50, WIDE)
    memory.center(hidden)
    keys = torch.nn.functional.normalize(memory.key(hidden), dim=-1).detach().numpy()
    memory.rows.insert_rows(
        RowInsert(
            torch.arange(1, 51).numpy(), keys, torch.randn(50, WIDE).numpy(), torch.ones(50).numpy()
        ),
        1,
    )
    queries = RowQueries(memory, memory, range(1, 51), hidden)
    nearest, _ = memory.select_rows(queries.reconstruct_states(queries.keys))
    assert torch.equal(nearest[:, 0], torch.arange(50))
    assert queries.explained_share() == 1


def test_directions_with_most_fisher_information_are_scaled_down_most():
    directions = torch.linalg.qr(torch.randn(6, 6)).Q
    eigenvalues = torch.tensor([3.0, 1.5, 1.0, 0.4, 0.1, 0.0])  # mean 1
    fisher = directions @ torch.diag(eigenvalues) @ directions.t() * 7
    root = directions.t() @ inverse_sqrt_factor(fisher, DAMPING) @ directions
    expected = torch.diag((eigenvalues + DAMPING).rsqrt())
    torch.testing.assert_close(root, expected, rtol=1e-3, atol=1e-2)


def test_gradients_are_transferred_to_the_coordinates(tokenizer):
    model, _ = convert_blocks(
        make_fact_model(make_teacher, tokenizer), [FeaturalConfig(k=256)] * LAYERS
    )
    memories = {2: get_featural_memories(model)[2]}
    tokens = torch.randint(1, 300, (4, 12))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = KFACParameters(model, memories, tokens, DAMPING)
    parameters.update_model()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, before[name], atol=1e-6)
    for tensor in parameters.model_tensors:
        tensor.requires_grad_(True)

    def compute_loss():
        return forward_with_activations(model, tokens).logits.logsumexp(-1).sum()

    compute_loss().backward()
    parameters.transfer_gradients()
    for delta in parameters.deltas:  # a small step along the gradient has the predicted effect
        with torch.no_grad():
            step = 1e-4 * delta.grad / delta.grad.norm()
            loss_before = compute_loss()
            delta.add_(step)
            parameters.update_model()
            loss_after = compute_loss()
            delta.sub_(step)
            parameters.update_model()
        expected = 1e-4 * float(delta.grad.norm())
        assert float(loss_after - loss_before) == pytest.approx(expected, rel=0.1)
