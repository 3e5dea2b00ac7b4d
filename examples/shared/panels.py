"""A figure of a recipe: panels side by side, with what is seen in them as the title."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels(number: int, width: float = 3.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Return a figure with that many panels in a row."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, number, figsize=(width * number, height), layout="constrained", squeeze=False
    )
    for panel in axes[0]:
        panel.grid(alpha=0.3)
        panel.locator_params(nbins=5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save(figure: Figure, path: Path, title: str) -> None:
    """Write the figure, and say where it is."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")
