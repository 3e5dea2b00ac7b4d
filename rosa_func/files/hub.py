"""A folder by its path, or by the name of a repository of the Hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path

_PART = r"\w(?:[\w.-]*\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_PART}(?:/{_PART})?", re.ASCII)


def folder(
    path: str | os.PathLike[str], patterns: list[str], check: Callable[[Path], object]
) -> Path:
    """Return the folder of that path, or one with files of a repository of the Hub.

    Those are taken from the cache where it has them, and else downloaded. Needs huggingface_hub
    for the name of a repository only.

    Args:
        path: of a folder that is there, or anything else; only a string is taken for a name.
        patterns: of the files that are wanted.
        check: raises a FileNotFoundError for a folder that lacks some of them.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a repository, it cannot be
            reached, or what it has does not pass the check.
    """
    is_name = isinstance(path, str) and _NAME.fullmatch(path) and not Path(path).exists()
    found = _of_repository(str(path), patterns, check) if is_name else Path(path)
    check(found)
    return found


def _of_repository(name: str, patterns: list[str], check: Callable[[Path], object]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no folder {name}; to load {name} from the Hub, install huggingface_hub"
        ) from error
    try:
        cached = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        check(cached)
        return cached
    except FileNotFoundError:  # a LocalEntryNotFoundError is one
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the Hub has no repository {name} for you: is it "
            "spelled as there? for one that is private or gated, log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, the cache of the Hub lacks files of {name}, and the Hub "
            f"cannot be reached: run `hf download {name}` where it can, or pass a folder"
        ) from error
