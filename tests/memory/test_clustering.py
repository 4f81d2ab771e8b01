"""Clusters of equal size."""

import itertools

import pytest
import torch

from dmt.memory.clustering import (
    arrange_in_grid,
    assign_evenly,
    cluster_directions,
    cluster_evenly,
)


@pytest.mark.parametrize(("num_points", "num_clusters"), [(12, 4), (60, 3), (5, 1), (7, 7)])
def test_all_clusters_have_the_same_size(num_points, num_clusters):
    labels = cluster_evenly(torch.randn(num_points, 3), num_clusters)
    assert labels.bincount().tolist() == [num_points // num_clusters] * num_clusters


def test_groups_that_lie_apart_are_found():
    centers = 100 * torch.eye(4)
    groups = torch.arange(4).repeat(5)
    labels = cluster_evenly(centers[groups] + torch.randn(20, 4), 4, seed=1)
    pairs = set(zip(groups.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 4


def test_points_are_assigned_nearly_as_well_as_possible():
    torch.manual_seed(3)
    distances = torch.rand(6, 3)
    labels = assign_evenly(distances)
    totals = [
        float(distances[torch.arange(6), torch.tensor(choice)].sum())
        for choice in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    ]
    total = float(distances[torch.arange(6), labels].sum())
    assert total <= sorted(totals)[len(totals) // 10]  # among the best tenth of all


def test_directions_are_clustered_by_cosine():
    torch.manual_seed(0)
    axes = torch.eye(3).repeat(10, 1)
    points = torch.nn.functional.normalize(axes + 0.05 * torch.randn(30, 3), dim=-1)
    centers = cluster_directions(points, 3, seed=2)
    assert torch.allclose(centers.norm(dim=-1), torch.ones(3))
    assert (centers.max(-1).values > 0.99).all()
    assert sorted(centers.argmax(-1).tolist()) == [0, 1, 2]


def test_more_directions_than_points_are_allowed():
    assert cluster_directions(torch.eye(2), 5).isfinite().all()


def test_a_grid_has_clusters_as_rows_and_like_offsets_in_a_column():
    torch.manual_seed(0)
    rows, columns = 100 * torch.eye(8)[:4], 10 * torch.eye(8)[4:]
    points = (rows.unsqueeze(1) + columns).flatten(0, 1)
    shuffled = torch.randperm(16)
    grid = points[shuffled][arrange_in_grid(points[shuffled], 4)].view(4, 4, 8)
    assert (grid[..., :4].argmax(-1) == grid[:, :1, :4].argmax(-1)).all()
    assert (grid[..., 4:].argmax(-1) == grid[:1, :, 4:].argmax(-1)).all()
    assert sorted(arrange_in_grid(torch.randn(25, 3), 5).tolist()) == list(range(25))
