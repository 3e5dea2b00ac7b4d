"""Keys are plain integers: values to pass around, never a hidden state."""

import hashlib
from collections.abc import Iterable
from numbers import Integral

import torch

# Wrappers put these in front of a module's names; a draw must not depend on them.
_COMPILED = "_orig_mod."
_PARALLEL = "module."


def fold_in(key: int, *data: int | str) -> int:
    """Derive a new key from a key and some data.

        fold_in(key, a, b) = the first 63 bits of SHA-256(key, a, b)

    Every part counts in full: integers of any size and sign, and names. The same arguments give
    the same key in every process, on every device. An integer of NumPy counts as the int that it
    is equal to.

    Args:
        key: an integer of any size.
        data: integers or strings, in order.

    Returns:
        A key in [0, 2**63).

    Raises:
        TypeError: if a key is not an integer, or data is neither integer nor str (a bool is
            neither).

    Example:
        >>> from rosa_func import fold_in
        >>> fold_in(0, "init") == fold_in(0, "init"), fold_in(0, 1) == fold_in(0, 2)
        (True, False)
    """
    check_key(key)
    for item in data:
        if not isinstance(item, str) and not _is_integer(item):
            raise TypeError(
                f"fold_in takes ints and strings, got {item!r} of type {type(item).__name__}"
            )
    plain = tuple(str(part) if isinstance(part, str) else int(part) for part in (key, *data))
    # repr is injective on a tuple of ints and strings, so no two inputs share a text.
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_key(key: int) -> None:
    """Refuse whatever is not an integer of Python or NumPy."""
    if not _is_integer(key):
        raise TypeError(
            f"a key is an int, got {key!r} of type {type(key).__name__}; "
            "pass for example key=0, or rosa_func.fold_in(key, step)"
        )


def _is_integer(value: object) -> bool:
    """Return whether it is an integer; a bool and a tensor are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def generator(key: int, purpose: str, name: str, *place: int) -> torch.Generator:
    """Return the generator of one draw: of a weight, or of the matrix at a place of a batch.

    It lives on the CPU, whatever the weight's device. Names lose the prefixes of wrappers, so that
    a compiled or parallel model draws the same.
    """
    # A CPU generator uses the low 32 bits of its seed only; the hash has mixed all of the key in.
    return torch.Generator().manual_seed(fold_in(key, purpose, canonical(name), *place))


def canonical(name: str) -> str:
    """Return a name without what wrappers such as torch.compile and DDP put in front of it."""
    name = name.replace(_COMPILED, "")
    while name.startswith(_PARALLEL):
        name = name.removeprefix(_PARALLEL)
    return name


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Return {the name without what wrappers put in front: the name} for all names of a model.

    DDP wraps a whole model: where some names begin without "module.", it is a name of the model's.
    """
    found = {name.replace(_COMPILED, ""): name for name in names}
    while found and all(name.startswith(_PARALLEL) for name in found):
        found = {plain.removeprefix(_PARALLEL): name for plain, name in found.items()}
    return found
