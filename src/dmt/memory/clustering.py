"""Cluster points: k-means whose clusters all have the same size, and k-means of directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounds of k-means; balanced clusters hardly change after these.
MAX_ROUNDS = 20


@torch.no_grad()
def cluster_evenly(points: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Return the cluster of each point by k-means with clusters of equal size.

    Args:
        points: `(points, width)`.
        num_clusters: a divisor of the number of points.
        seed: of the points that are the first centers.

    Returns:
        `(points,)`, each cluster as often as any other.

    Source: Malinen and Fränti 2014, S+SSPR (balanced k-means); here points are assigned greedily.
    """
    points, width = points.detach().cpu().float(), points.shape[1]
    generator = torch.Generator().manual_seed(seed)
    centers = points[torch.randperm(len(points), generator=generator)[:num_clusters]]
    labels = torch.empty(0)
    for _ in range(MAX_ROUNDS):
        previous, labels = labels, assign_evenly(torch.cdist(points, centers))
        if torch.equal(labels, previous):
            break
        centers = points[labels.argsort(stable=True)].view(num_clusters, -1, width).mean(1)
    return labels


def assign_evenly(distances: Tensor) -> Tensor:
    """Assign points to clusters of equal size, each point to a near one.

    In each round every point that is left asks for the nearest cluster with room, and each cluster
    takes the nearest of those that ask for it.

    Args:
        distances: `(points, clusters)`; the number of points is a multiple of that of clusters.

    Returns:
        The cluster of each point, `(points,)`.
    """
    num_points, num_clusters = distances.shape
    labels = torch.full((num_points,), -1)
    room = torch.full((num_clusters,), num_points // num_clusters)
    while len(left := (labels < 0).nonzero().flatten()):
        nearest = distances[left].masked_fill(room == 0, torch.inf).min(-1)
        # By cluster, the nearest point first.
        order = nearest.values.argsort(stable=True)
        order = order[nearest.indices[order].argsort(stable=True)]
        clusters = nearest.indices[order]
        counts = clusters.bincount(minlength=num_clusters)
        position = torch.arange(len(order)) - (counts.cumsum(0) - counts)[clusters]
        accepted = position < room[clusters]
        labels[left[order[accepted]]] = clusters[accepted]
        room -= clusters[accepted].bincount(minlength=num_clusters)
    return labels


@torch.no_grad()
def arrange_in_grid(points: Tensor, size: int) -> Tensor:
    """Return an order of points in which those of a row are alike, and columns are alike in rows.

    Row by row it fills a square. Rows are clusters; a column holds points that lie in the same
    direction from the centers of their rows.

    Args:
        points: `(size * size, width)`.
        size: of a row.

    Returns:
        Indices of points, `(size * size,)`.
    """
    points = points.detach().cpu().float()
    order = cluster_evenly(points, size).argsort(stable=True).view(size, size)
    offsets = points[order] - points[order].mean(1, keepdim=True)
    columns = torch.arange(size).repeat(size, 1)
    for _ in range(MAX_ROUNDS):
        aligned = offsets.gather(1, columns.unsqueeze(-1).expand_as(offsets))
        distances = torch.cdist(offsets, aligned.mean(0).expand_as(offsets))
        previous, columns = (
            columns,
            torch.stack([assign_evenly(of_row).argsort() for of_row in distances]),
        )
        if torch.equal(columns, previous):
            break
    return order.gather(1, columns).flatten()


@torch.no_grad()
def cluster_directions(points: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Return centers of points of length 1, compared by cosine.

    Args:
        points: `(points, width)`.
        num_clusters: number of centers; where it exceeds that of the points, some are equal.
        seed: of the points that are the first centers.

    Returns:
        `(clusters, width)`, of length 1.

    Source: Dhillon and Modha 2001, Machine Learning 42 (spherical k-means).
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)
    first = order[torch.arange(num_clusters) % len(points)]
    centers = points[first.to(points.device)]
    for _ in range(MAX_ROUNDS):
        labels = (points @ centers.t()).argmax(-1)
        sums = torch.zeros_like(centers).index_add(0, labels, points)
        is_empty = labels.bincount(minlength=num_clusters) == 0
        centers = torch.where(is_empty.unsqueeze(-1), centers, F.normalize(sums, dim=-1))
    return centers
