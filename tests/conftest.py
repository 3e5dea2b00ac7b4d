"""The Hypothesis profile of the tests, the toy parts, and what is not collected."""

import gc
import os
import signal
import sys
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core of its own, and so what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import Phase, settings

from toys import registered

# Derandomized: the same examples in every run, so that a failure is a change of the code. The
# phase that explains failures is left out: it takes minutes.
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile(
    "rosa_func", deadline=None, derandomize=True, max_examples=10, phases=_PHASES
)
settings.load_profile("rosa_func")

# A shell lets what it starts in the background ignore Ctrl-C, and so what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The experiments need Python 3.11, for its tomllib.
collect_ignore_glob = ["test_experiments*.py"] if sys.version_info < (3, 11) else []


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """Let the library know the toy bases and terms while the tests of a file run."""
    with registered():
        yield


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """Keep what is there from the searches for who shares a tensor, which look at all objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
