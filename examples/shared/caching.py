"""A directory that is made once and found again, whole or not at all."""

import tempfile
from collections.abc import Callable
from pathlib import Path


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return the directory; if it is not there, let `make` fill one that becomes it."""
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Written next to its place and moved there whole: an interruption leaves no half of a cache.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="unfinished-") as unfinished:
        content = Path(unfinished) / "content"
        make(content)
        try:
            content.rename(directory)
        except OSError:  # another run was quicker
            if not directory.exists():
                raise
    return directory
