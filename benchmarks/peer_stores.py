"""Other libraries on the rows of `store.py`, which starts this with an interpreter that has them: a folder with arrays, k."""

import sys
import time

import numpy as np


def best_ms(call, repeats=5):
    """Milliseconds of the fastest of some calls, after one to warm up."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


def tell(name, taken, found, exact, made):
    """A line that `store.py` puts into its table."""
    hit = np.mean(
        [
            len(set(mine) & set(theirs)) / len(theirs)
            for mine, theirs in zip(found, exact, strict=True)
        ]
    )
    print(name, taken, hit, made, sep="\t", flush=True)


def main() -> None:
    folder, k = sys.argv[1], int(sys.argv[2])
    keys, queries, exact = (
        np.load(f"{folder}/{name}.npy") for name in ("keys", "queries", "exact")
    )

    import hnswlib

    began = time.perf_counter()
    index = hnswlib.Index(space="l2", dim=keys.shape[1])
    index.init_index(max_elements=len(keys), ef_construction=200, M=32)
    index.set_num_threads(1)
    index.add_items(keys)
    index.set_ef(128)
    made = time.perf_counter() - began
    tell(
        "hnswlib",
        best_ms(lambda: index.knn_query(queries, k)),
        index.knn_query(queries, k)[0],
        exact,
        made,
    )

    from usearch.index import Index

    began = time.perf_counter()
    other = Index(
        ndim=keys.shape[1], metric="l2sq", dtype="f32", connectivity=32, expansion_search=128
    )
    other.add(np.arange(len(keys)), keys, threads=1)
    made = time.perf_counter() - began
    tell(
        "usearch",
        best_ms(lambda: other.search(queries, k, threads=1)),
        other.search(queries, k, threads=1).keys,
        exact,
        made,
    )

    import torch
    from memorizing_transformers_pytorch.knn_memory import KNNMemory

    torch.set_num_threads(1)
    began = time.perf_counter()
    memory = KNNMemory(
        dim=keys.shape[1],
        max_memories=len(keys),
        num_indices=1,
        memmap_filename=f"{folder}/memory.memmap",
        multiprocessing=False,
    )
    pairs = torch.stack(
        [
            torch.as_tensor(keys),
            torch.arange(len(keys)).float().unsqueeze(-1).expand(-1, keys.shape[1]),
        ],
        dim=1,
    )
    for part in pairs.split(4096):
        memory.add(part.unsqueeze(0))
    made = time.perf_counter() - began
    asked = torch.as_tensor(queries).unsqueeze(0)
    found, mask = memory.search(asked, topk=k)
    places = np.where(mask[0].numpy(), found[0, :, :, 1, 0].numpy().round().astype(np.int64), -1)
    tell("KNNMemory", best_ms(lambda: memory.search(asked, topk=k)), places, exact, made)


if __name__ == "__main__":
    main()
