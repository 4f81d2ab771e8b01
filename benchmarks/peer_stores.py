"""Search the rows of `store.py` by other libraries.

Usage: python peer_stores.py FOLDER K, with an interpreter that has the libraries; the folder holds
keys.npy, queries.npy and exact.npy. `store.py` starts it.
"""

import sys
import time

import numpy as np


def measure_best_ms(call, repeats=5):
    """Return the milliseconds of the fastest call, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def print_row(name, milliseconds, neighbors, exact, fill_seconds):
    """Print a line that `store.py` puts into its table."""
    recall = np.mean(
        [
            len(set(ids) & set(exact_ids)) / len(exact_ids)
            for ids, exact_ids in zip(neighbors, exact, strict=True)
        ]
    )
    print(name, milliseconds, recall, fill_seconds, sep="\t", flush=True)


def main() -> None:
    folder, k = sys.argv[1], int(sys.argv[2])
    keys, queries, exact = (
        np.load(f"{folder}/{name}.npy") for name in ("keys", "queries", "exact")
    )

    import hnswlib

    start = time.perf_counter()
    index = hnswlib.Index(space="l2", dim=keys.shape[1])
    index.init_index(max_elements=len(keys), ef_construction=200, M=32)
    index.set_num_threads(1)
    index.add_items(keys)
    index.set_ef(128)
    fill_seconds = time.perf_counter() - start
    print_row(
        "hnswlib",
        measure_best_ms(lambda: index.knn_query(queries, k)),
        index.knn_query(queries, k)[0],
        exact,
        fill_seconds,
    )

    from usearch.index import Index

    start = time.perf_counter()
    index = Index(
        ndim=keys.shape[1], metric="l2sq", dtype="f32", connectivity=32, expansion_search=128
    )
    index.add(np.arange(len(keys)), keys, threads=1)
    fill_seconds = time.perf_counter() - start
    print_row(
        "usearch",
        measure_best_ms(lambda: index.search(queries, k, threads=1)),
        index.search(queries, k, threads=1).keys,
        exact,
        fill_seconds,
    )

    import torch
    from memorizing_transformers_pytorch.knn_memory import KNNMemory

    torch.set_num_threads(1)
    start = time.perf_counter()
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
    fill_seconds = time.perf_counter() - start
    query_batch = torch.as_tensor(queries).unsqueeze(0)
    pairs_found, mask = memory.search(query_batch, topk=k)
    rows = np.where(
        mask[0].numpy(), pairs_found[0, :, :, 1, 0].numpy().round().astype(np.int64), -1
    )
    print_row(
        "KNNMemory",
        measure_best_ms(lambda: memory.search(query_batch, topk=k)),
        rows,
        exact,
        fill_seconds,
    )


if __name__ == "__main__":
    main()
