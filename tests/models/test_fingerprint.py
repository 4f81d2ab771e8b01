"""The fingerprint of a model is that of its weights, wherever they are."""

import copy

import pytest

from dmt.models.fingerprint import hash_model


def test_weights_that_accelerate_offloads_have_the_same_fingerprint(any_teacher):
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(copy.deepcopy(any_teacher), "cpu")
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert hash_model(offloaded) == hash_model(any_teacher)
