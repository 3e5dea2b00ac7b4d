"""What the options of the examples may be, as types for argparse."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of integers from `least` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        return int(text)

    return read


positive, not_negative = at_least(1), at_least(0)


def positive_number(text: str) -> float:
    """Read a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive, finite number, got {text!r}")
    return number


def density(text: str) -> float:
    """Read a share of the entries of a weight, in (0, 1]."""
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return number


def folder(text: str) -> Path:
    """Read the path of a folder, which need not be there yet but must be possible."""
    path = Path(text)
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, and {nearest} is a file")
    return path


def text_file(text: str) -> Path:
    """Read the path of a file, which must be there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def of_a_recipe(about: str, short: str, draws: bool = True) -> argparse.Namespace:
    """Read the options of a recipe: --short, and --out if it draws a figure."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--short", action="store_true", help=short)
    if draws:
        parser.add_argument("--out", type=folder, default="runs/recipes", help="for the figure")
    return parser.parse_args()
