"""Packages that some functions need and the library does not: they come with its extras."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra to install where an import in the `with` block finds no package.

    Raises:
        ModuleNotFoundError: as the import, with the command that installs what is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}; it comes with an extra: pip install "rosa-func[{extra}]"',
            name=error.name,
            path=error.path,
        ) from error
