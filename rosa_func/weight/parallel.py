"""One weight a worker, one BLAS thread each; and work that is finished, come what may."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock, Thread, local
from typing import TypeVar

import torch

from rosa_func.weight.parts import Weight

K = TypeVar("K")
S = TypeVar("S")

_here = local()  # what is set in a worker alone
HOST = torch.device("cpu")
_STREAMLESS = ("cpu", "meta")


def map_weights(
    work: Callable[[K], S],
    weights: Mapping[K, Weight | torch.device],
    done: Callable[[K], object] | None = None,
) -> list[S]:
    """Return [work(name) for name in weights], computed by as many workers as torch has threads.

    LAPACK and BLAS give other bits with another number of threads. So each worker has one thread,
    and results do not depend on the machine's threads or on what else is adapted. This is faster
    too. Gradients are off inside.

    Where a weight is on a GPU there is one worker, on the streams of the caller. Several threads
    would share these, and torch fails where its first decompositions there come from several. Nor
    are decompositions batched: torch before 2.12 computes those of a batch one after another, too,
    if they are larger than 32 x 32. (Untested on a GPU.)

    An exception, of a worker or in this thread (Ctrl-C), is raised when the workers have finished
    what they had begun; the rest is not begun.

    Args:
        work: what a worker does.
        weights: what it is done to by name, and the weight of that name, or the device it is on.
        done: called here with each name, in their order, when its work is done.
    """
    threads = torch.get_num_threads()
    devices = {w if isinstance(w, torch.device) else w.base.device for w in weights.values()}
    follow = on_the_same_streams(devices)

    def single(name: K) -> S:
        torch.set_num_threads(1)
        _here.is_worker = True
        follow()
        with torch.no_grad():
            return work(name)

    pool = ThreadPoolExecutor(threads if devices <= {HOST} else 1)
    futures: list[Future[S]] = []
    results: list[S] = []
    try:
        # A pool whose `submit` is interrupted may forget a worker.
        uninterrupted(lambda: futures.extend([pool.submit(single, name) for name in weights]))
        for name, future in zip(weights, futures, strict=True):
            results.append(future.result())
            if done is not None:
                done(name)
        return results
    finally:
        uninterrupted(lambda: pool.shutdown(cancel_futures=True))
        torch.set_num_threads(threads)


def is_worker() -> bool:
    """Return whether this thread is a worker of `map_weights`."""
    return getattr(_here, "is_worker", False)


def on_the_same_streams(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Return a function that puts another thread on the streams that are current in this one.

    Each thread has its own, and work on another stream would not wait for what was asked for here.
    """
    streams = [torch.accelerator.current_stream(d) for d in devices if d.type not in _STREAMLESS]
    if streams:
        streams.append(torch.accelerator.current_stream())  # the last one sets the current device

    def follow() -> None:
        for stream in streams:
            torch.accelerator.set_stream(stream)

    return follow


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
