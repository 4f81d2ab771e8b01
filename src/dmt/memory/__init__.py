"""Memory layers: `(batch, time, width)` to the same shape, by reading rows."""

from dmt.memory.associative import AssociativeMemory
from dmt.memory.experts import ExpertsMemory
from dmt.memory.featural import FeaturalMemory
from dmt.memory.insert_policy import InsertPolicy
from dmt.memory.low_rank import LowRankMemory
from dmt.memory.ngram import NgramMemory
from dmt.memory.none import NoMemory
from dmt.memory.peer import PeerMemory
from dmt.memory.product_key import ProductKeyMemory
from dmt.memory.pruned import PrunedMemory
from dmt.memory.sum import SumMemory
from dmt.memory.token import TokenMemory
from dmt.memory.transcoder import TranscoderMemory

__all__ = [
    "AssociativeMemory",
    "ExpertsMemory",
    "FeaturalMemory",
    "InsertPolicy",
    "LowRankMemory",
    "NgramMemory",
    "NoMemory",
    "PeerMemory",
    "ProductKeyMemory",
    "PrunedMemory",
    "SumMemory",
    "TokenMemory",
    "TranscoderMemory",
]
