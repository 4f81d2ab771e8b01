"""Associative memory: a layer that remembers. What a token finds among stored rows is added to what a base says."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.admission import Policy, admit
from dmt.memory.offers import Heard, Offer
from dmt.memory.rows import Rows
from dmt.memory.straight_through import returned
from dmt.memory.together import gathered, gathered_words
from dmt.records import Changes, Numbers

WRITES = ("projection", "teacher", "residual")
"""What an inserted value is: learnt from the hidden state, the teacher's answer, or what the base lacks of that."""
DOUBT = 0.7
"""Cosine at which a row has, to begin with, the weight of the base: where training led it (EXPERIMENTS.md)."""
DOUBTS = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.2)
"""What `weigh` chooses from; with the last, rows are hardly heard."""
LATELY = 0.8
"""Share of what `weigh` knew that still counts after another pass."""
TAPE = 4_096
"""Rows last written whose hidden states are kept, so that what comes back can teach the projections that made it."""


class AssociativeMemory(nn.Module):
    """Reads the stored rows nearest to a token's query, and, while it writes, offers a row of its own for each token.

    Rows offered in a step are in the memory when `settle` has ended the step, never before: no token sees what another
    of the same step wrote, be it later in the text, in another layer's pass or in another sequence. A token's output
    therefore depends on that token's hidden state and on rows of steps past alone.

    Keys and queries have unit length. The weights of the k rows read are a softmax over `sharpness` x cosine, in which
    the base has a part too, as a row would of cosine `doubt`: where nothing near is stored, the base alone is heard.

    Args:
        width: size of a hidden state, of a key and of a value.
        k: rows read per token.
        base: what is said beside the rows: a memory of its own, or None. With no rows the answer is the base's.
        writes: one of `WRITES`; of the latter two, `teach` has to follow each pass that writes.
        policy: which offers come in and how many rows are kept.
        places: rows there is room for at the start, as many as a saved memory had.
        index: how rows are found: `exact`, or a kind of faiss index (`indexes.py`).
        write_from: share of the training after which it writes; kept for whoever trains it.

    Source: the layer of query, key and value projections over a store that is written to as it is read; its gradients are
        straight-through (`straight_through.py`). Weighing nothing beside the rows is ours.
    """

    def __init__(
        self,
        width: int,
        k: int,
        base: nn.Module | None,
        writes: str,
        policy: Policy,
        places: int = 0,
        index: str = "exact",
        write_from: float = 0.0,
        sharpness: float = 20.0,
    ) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if writes not in WRITES:
            raise ValueError(f"writes must be one of {', '.join(WRITES)}, got {writes}")
        if writes == "residual" and base is None:
            raise ValueError("writes=residual is what a base lacks; without a base use writes=teacher or projection")
        self.width, self.k, self.writes, self.policy = width, k, writes, policy
        self.base = base
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width) if writes == "projection" else None
        self.output = nn.Linear(width, width, bias=False)
        self.log_sharpness = nn.Parameter(torch.empty(()))
        self.doubt = nn.Parameter(torch.empty(()))
        self.rows = Rows(width, width, places, index)
        self.sharpness, self.write_from = sharpness, write_from
        self.writing = False
        self.tag = ""
        self.heard: Heard | None = None
        self._offers: list[Offer] = []
        self._reads: list[tuple[Tensor, Tensor]] = []
        self._last_read: tuple[Tensor, Tensor] | None = None
        self._tried: Tensor | None = None  # squared error of late for each of `DOUBTS`
        self._tape: Tensor | None = None  # hidden states (m, width) of rows that were written last
        self._tape_ids: Tensor | None = None  # and their numbers
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Projections that change nothing, no rows."""
        for projection in (self.query, self.key, self.value, self.output):
            if projection is not None:
                nn.init.eye_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        self.log_sharpness.fill_(math.log(self.sharpness))
        self.doubt.fill_(DOUBT)
        self.rows.reset()

    @torch.no_grad()
    def centre(self, hidden: Tensor) -> None:
        """Let queries and keys be about the mean of `hidden` `(tokens, width)`: what all have in common tells nobody apart."""
        for projection in (self.query, self.key):
            projection.bias.copy_(-projection.weight @ hidden.mean(0))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        base = None if self.base is None else self.base(hidden).reshape(-1, self.width)
        if self.writing:
            self._offer(flat, None if base is None else base.detach())
        if self.heard is not None:
            self.heard.tokens += len(flat)
            self.heard.of_base += 0 if len(self.rows) else len(flat)
        if len(self.rows):
            return self._read(flat, base).view_as(hidden)
        return (self.output(torch.zeros_like(flat)) if base is None else base).view_as(hidden)  # in the graph like an answer

    def _read(self, hidden: Tensor, base: Tensor | None) -> Tensor:
        queries = F.normalize(self.query(hidden), dim=-1)
        found = self.rows.search(queries, self.k)
        there = found.distances.isfinite()
        kept_keys, kept_values, origin = self._kept(found.places, there)
        keys, values = returned(
            queries, kept_keys, kept_values, self.rows.keys[found.places], self.rows.values[found.places], origin
        )
        scores = torch.einsum("nd,nkd->nk", queries, keys.to(queries.dtype)).masked_fill(~there, -torch.inf)
        weights = self._weights(scores)
        if self.heard is not None:
            self.heard.of_base += len(weights) - float(weights.detach().sum())
            self.heard.nearest.append(found.distances[:, 0].sqrt())
        if self.writing:
            self._reads.append((found.places[there], weights.detach()[there]))
            if not torch.is_grad_enabled():  # whoever trains does not weigh
                self._last_read = scores, found.places
        return self._answer(base, weights, values)

    def _answer(self, base: Tensor | None, weights: Tensor, values: Tensor) -> Tensor:
        """What rows say and what the base says: all of it beside what it lacks, its share beside whole answers."""
        said: Tensor = self.output(torch.einsum("nk,nkw->nw", weights, values.to(weights.dtype)))
        if base is None:
            return said
        return said + (base if self.writes != "teacher" else base * (1 - weights.sum(-1, keepdim=True)))

    def _weights(self, cosines: Tensor, doubt: Tensor | None = None) -> Tensor:
        """Of rows, `(n, k)`, beside a base that counts like a row of cosine `doubt`, in which training has its say."""
        doubt = self.doubt if doubt is None else doubt
        cosines = torch.cat([cosines, doubt.to(cosines.dtype).expand(len(cosines), 1)], dim=1)
        return (cosines * self.log_sharpness.exp()).softmax(-1)[:, :-1]

    @torch.no_grad()
    def select(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are read for `hidden` `(tokens, width)`: places and weights `(tokens, k)`; weight 0 where there was none."""
        queries = F.normalize(self.query(hidden), dim=-1)
        found = self.rows.search(queries, self.k)
        cosines = torch.einsum("nd,nkd->nk", queries, self.rows.keys[found.places].to(queries.dtype))
        return found.places, self._weights(cosines.masked_fill(found.distances.isinf(), -torch.inf))

    def _kept(self, places: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values last written, made anew by the projections of now, and which of them each place holds."""
        nobody = torch.full_like(places, -1)
        if self._tape is None or self._tape_ids is None or not len(self._tape) or not torch.is_grad_enabled():
            nothing = self.rows.keys.new_zeros(0, self.width)
            return nothing, nothing, nobody
        self._tape, self._tape_ids = self._tape.to(places.device), self._tape_ids.to(places.device)
        ids = self.rows.ids[places]
        order = self._tape_ids.argsort()
        at = torch.searchsorted(self._tape_ids[order], ids).clamp_max(len(order) - 1)
        origin = torch.where((self._tape_ids[order][at] == ids) & there, order[at], nobody)
        keys = F.normalize(self.key(self._tape), dim=-1)
        values = torch.zeros_like(keys).detach() if self.value is None else self.value(self._tape)
        return keys, values, origin

    @torch.no_grad()
    def _offer(self, hidden: Tensor, base: Tensor | None) -> None:
        keys = F.normalize(self.key(hidden), dim=-1)
        values = None if self.value is None else self.value(hidden).float()
        self._offers.append(Offer(hidden.detach(), keys.float(), values, base, self.tag))

    @torch.no_grad()
    def teach(self, wanted: Tensor, where: Tensor | None = None) -> None:
        """Say what the last pass, which wrote, should have answered: `(..., width)`; nothing where values are projections.

        Args:
            where: a mask `(...)` of the tokens that are worth a row; all where it is None.
        """
        if not self._offers:
            raise ValueError("teach after a pass that writes")
        if where is not None:
            self._offers[-1], wanted = self._offers[-1].only(where.flatten()), wanted.reshape(-1, self.width)[where.flatten()]
        offer = self._offers[-1]
        if self.value is None:
            values = wanted.reshape(-1, self.width).float()
            offer.values = values if self.writes == "teacher" or offer.base is None else values - offer.base.float()

    @torch.no_grad()
    def weigh(self) -> None:
        """Set `doubt` to what would have served best lately, on text whose own rows were not there yet; after `teach`.

        For whoever reads without training. Few rows then do no harm and many are heard.
        """
        offers, self._last_read, read = self._offers, None, self._last_read
        if not offers or offers[-1].values is None or self.value is not None:
            return
        if read is None:
            if not len(self.rows):  # the first ones are hardly heard before they have been judged
                self.doubt.fill_(DOUBTS[-1])
            return
        offer, (cosines, places) = offers[-1], read
        values = self.rows.values[places]
        wanted = offer.values if self.writes == "teacher" or offer.base is None else offer.values + offer.base
        errors = []
        for doubt in DOUBTS:
            weights = self._weights(cosines, torch.tensor(doubt, device=cosines.device))
            errors.append((wanted - self._answer(offer.base, weights, values).float()).square().sum())
        tried = torch.stack(errors)
        self._tried = tried if self._tried is None else LATELY * self._tried.to(tried) + tried
        self.doubt.fill_(DOUBTS[int(self._tried.argmin())])

    def discard(self) -> None:
        """Forget what passes since the last step have read and offered: something went wrong in one of them."""
        self._offers, self._reads, self._last_read = [], [], None

    @torch.no_grad()
    def settle(self, step: int, now: float, take_ids: Callable[[int], Numbers]) -> Changes:
        """End a step: reads are noted, offers come in by the policy; what is to be written down, usage aside.

        Of several processes that train together each sees what all read and offer, so all end with the same rows; `now`
        and `take_ids` have to give the same to each.

        Args:
            step: number of the step that ends.
            now: seconds since 1970.
            take_ids: gives out numbers that no row has or had.
        """
        nothing, nowhere = self.rows.keys.new_zeros(0, self.width), self.rows.ids.new_zeros(0)
        offers, reads, self._offers, self._reads, self._last_read = self._offers, self._reads, [], [], None
        if any(each.values is None for each in offers):
            raise ValueError(f"writes={self.writes} needs the teacher's answer: call `teach` after each pass that writes")
        places = gathered(torch.cat([nowhere, *(place for place, _ in reads)]))
        weights = gathered(torch.cat([nothing.new_zeros(0), *(weight.float() for _, weight in reads)]))
        self.rows.use(places.cpu().numpy(), weights.double().cpu().numpy(), step, now, self.policy.decay)
        keys, values, hidden = (
            gathered(torch.cat([nothing, *(getattr(each, name).float() for each in offers)]))
            for name in ("keys", "values", "hidden")
        )
        tags = gathered_words([each.tag for each in offers for _ in range(len(each.keys))])
        admitted = admit(self.rows, keys, values, tags, self.policy, step, now, take_ids)
        self._remember(hidden[torch.as_tensor(admitted.offers, device=hidden.device)], admitted.alone)
        return admitted.changes

    def _remember(self, hidden: Tensor, ids: Numbers) -> None:
        """Keep the hidden states `(n, width)` that the rows numbered `ids` `(n,)` were made from, the last `TAPE` of all."""
        numbers = torch.as_tensor(ids, device=hidden.device)
        if self._tape is not None and self._tape_ids is not None:
            hidden, numbers = torch.cat([self._tape.to(hidden), hidden]), torch.cat([self._tape_ids.to(numbers), numbers])
        self._tape, self._tape_ids = hidden[-TAPE:], numbers[-TAPE:]

    def tape(self) -> tuple[Tensor, Tensor]:
        """Hidden states `(m, width)` that the rows written last were made from, and the rows' numbers `(m,)`."""
        if self._tape is None or self._tape_ids is None:
            return torch.zeros(0, self.width), torch.zeros(0, dtype=torch.long)
        return self._tape.cpu().clone(), self._tape_ids.cpu().clone()

    def set_tape(self, hidden: Tensor, ids: Tensor) -> None:
        """Go on with what `tape` gave."""
        self._tape, self._tape_ids = hidden.to(self.rows.keys.device), ids.to(self.rows.keys.device)

    def extra_repr(self) -> str:
        return f"width={self.width}, k={self.k}, writes={self.writes}, rows={len(self.rows)} of {self.policy.capacity}"
