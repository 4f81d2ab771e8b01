"""Product keys: n^2 keys as all pairs of two tables of n, searched exactly by looking at 2 n."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.ops import linear


class ProductKeyQuery(nn.Module):
    """Finds slots by product keys: slot `i n + j` has the score `a_i + b_j`.

    Each head has a query of its own, whose first half is compared with a table of n sub-keys and
    whose second half with another: by their product, or by their cosine, times a factor that is
    learned. The best pairs are exact: each half of one of the best k pairs is among the best k of
    its table.

    Args:
        width: size of a hidden state.
        num_sub_keys: n, sub-keys in a table.
        heads: queries, each with two tables.
        key_width: size of a query; half of it is the size of a sub-key.
        has_cosines: whether scores are cosines, not products.

    Source: Lample et al. 2019, arXiv 1907.05242; cosines as Berges et al. 2024, arXiv 2412.09764.
        Lample et al. normalize queries over the batch, which makes the output of a token depend on
        other tokens.
    """

    def __init__(
        self, width: int, num_sub_keys: int, heads: int, key_width: int, *, has_cosines: bool
    ) -> None:
        super().__init__()
        self.num_sub_keys, self.heads, self.key_width = num_sub_keys, heads, key_width
        self.weight = nn.Parameter(torch.empty(heads * key_width, width))
        self.bias = nn.Parameter(torch.empty(heads * key_width))
        self.sub_keys = nn.Parameter(torch.empty(heads, 2, num_sub_keys, key_width // 2))
        self.scale = nn.Parameter(torch.empty(heads)) if has_cosines else None

    @torch.no_grad()
    def reset(self, scale: float = 1.0) -> None:
        """Draw random queries and sub-keys; `scale` is the factor of the cosines."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.sub_keys)
        if self.scale is not None:
            nn.init.constant_(self.scale, scale)

    def compute_queries(self, hidden: Tensor) -> Tensor:
        """Return the halves of each query, `(tokens, heads, 2, key_width / 2)`.

        Those of cosines have length 1.
        """
        queries = linear(hidden, self.weight, self.bias).view(hidden.shape[0], self.heads, 2, -1)
        return queries if self.scale is None else F.normalize(queries, dim=-1)

    def compute_scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of all sub-keys for `(tokens, width)`: `(tokens, heads, 2, n)`."""
        sub_keys = self.sub_keys if self.scale is None else F.normalize(self.sub_keys, dim=-1)
        products = torch.einsum("thcd,hcnd->thcn", self.compute_queries(hidden), sub_keys)
        return products if self.scale is None else products * self.scale.view(-1, 1, 1)

    def search(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the ids and scores of the `k` best slots of each head, `(tokens, heads, k)`."""
        tops = self.compute_scores(hidden).topk(min(k, self.num_sub_keys), dim=-1)
        first_scores, second_scores = tops.values.unbind(-2)
        pair_scores = (first_scores.unsqueeze(-1) + second_scores.unsqueeze(-2)).flatten(-2)
        best = pair_scores.topk(k, dim=-1)
        rows, columns = (
            best.indices // tops.indices.shape[-1],
            best.indices % tops.indices.shape[-1],
        )
        first_ids, second_ids = tops.indices.unbind(-2)
        ids = first_ids.gather(-1, rows) * self.num_sub_keys + second_ids.gather(-1, columns)
        return ids, best.values
