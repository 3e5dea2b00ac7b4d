"""One weight a worker, one BLAS thread each."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")


def map_weights(work: Callable[[T], S], items: Iterable[T]) -> list[S]:
    """Return [work(item) for item in items], computed by as many workers as torch has threads.

    LAPACK and BLAS give other bits with another number of threads. So each worker has one thread,
    and results do not depend on the machine's threads or on what else is adapted. This is faster
    too. Gradients are off inside.
    """
    threads = torch.get_num_threads()

    def single(item: T) -> S:
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(item)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(single, items))
    finally:
        torch.set_num_threads(threads)
