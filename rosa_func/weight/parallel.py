"""One weight a worker, one BLAS thread each; and work that is finished, come what may."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock, Thread, local
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")

_here = local()  # what is set in a worker alone


def map_weights(
    work: Callable[[T], S], items: Iterable[T], done: Callable[[T], object] | None = None
) -> list[S]:
    """Return [work(item) for item in items], computed by as many workers as torch has threads.

    LAPACK and BLAS give other bits with another number of threads. So each worker has one thread,
    and results do not depend on the machine's threads or on what else is adapted. This is faster
    too. Gradients are off inside.

    An exception, of a worker or in this thread (Ctrl-C), is raised when the workers have finished
    what they had begun; the rest is not begun.

    Args:
        work: what a worker does.
        items: what it is done to.
        done: called here with each item, in their order, when its work is done.
    """
    threads = torch.get_num_threads()

    def single(item: T) -> S:
        torch.set_num_threads(1)
        _here.is_worker = True
        with torch.no_grad():
            return work(item)

    items, pool = list(items), ThreadPoolExecutor(threads)
    futures: list[Future[S]] = []
    results: list[S] = []
    try:
        # A pool whose `submit` is interrupted may forget a worker.
        uninterrupted(lambda: futures.extend([pool.submit(single, item) for item in items]))
        for item, future in zip(items, futures, strict=True):
            results.append(future.result())
            if done is not None:
                done(item)
        return results
    finally:
        uninterrupted(lambda: pool.shutdown(cancel_futures=True))
        torch.set_num_threads(threads)


def is_worker() -> bool:
    """Return whether this thread is a worker of `map_weights`."""
    return getattr(_here, "is_worker", False)


def uninterrupted(work: Callable[[], None]) -> None:
    """Do the work in a thread of its own, which Ctrl-C does not reach, and wait for its end.

    A Ctrl-C while it lasts is raised afterwards.
    """
    begun, ended = Lock(), Event()
    raised: list[BaseException] = []

    def attempt() -> None:
        if begun.acquire(blocking=False):  # or another attempt is at it
            try:
                work()
            except BaseException as error:
                raised.append(error)
            ended.set()

    while not ended.is_set():
        try:
            Thread(target=attempt).start()
            ended.wait()
        except RuntimeError:  # there can be no more threads
            attempt()
        except BaseException as error:
            raised.append(error)
    if raised:
        raise raised[0]
