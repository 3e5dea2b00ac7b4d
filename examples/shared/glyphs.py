"""Digits and letters in the fonts that come with matplotlib: labelled images, and a base model."""

import string
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

CHARACTERS = string.digits + string.ascii_uppercase
SIDE = 16  # of an image, in pixels
SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "cmss10")
SERIF = ("DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "cmr10")


class Glyphs(NamedTuple):
    """Images, each a row of SIDE * SIDE brightnesses, and the places of their characters."""

    images: Tensor
    labels: Tensor

    def rows(self, chosen: Tensor) -> "Glyphs":
        """Return some of them."""
        return Glyphs(self.images[chosen], self.labels[chosen])

    def batches(self, size: int, steps: int, seed: int) -> "list[Glyphs]":
        """Return random batches, one a step."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.labels), (steps, size), generator=generator)
        return [self.rows(rows) for rows in chosen]


@cache
def templates(font: str) -> Tensor:
    """Return each character once, white on black, twice as large: (characters, 2 SIDE, 2 SIDE)."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    layout = ImageFont.Layout.BASIC  # the other one is not in every build
    face = ImageFont.truetype(str(path), size=int(1.6 * SIDE), layout_engine=layout)
    pictures = []
    for character in CHARACTERS:
        picture = Image.new("L", (2 * SIDE, 2 * SIDE))
        ImageDraw.Draw(picture).text((SIDE, SIDE), character, 255, face, anchor="mm")
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    return torch.stack(pictures).view(-1, 2 * SIDE, 2 * SIDE) / 255


def glyphs(fonts: tuple[str, ...], number: int, seed: int, turn: float = 0.0) -> Glyphs:
    """Draw that many, each in one of the fonts, turned about so many degrees, shifted and noisy."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CHARACTERS), (number,), generator=generator)
    font = torch.randint(len(fonts), (number,), generator=generator)
    noise = torch.randn(number, 4, generator=generator)
    angle = torch.deg2rad(turn + 8 * noise[:, 0])
    scale = 1 + 0.08 * noise[:, 1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = 0.08 * noise[:, 2], 0.08 * noise[:, 3]
    places = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(number, 2, 3)
    size = [number, 1, SIDE, SIDE]
    grid = F.affine_grid(places, size, align_corners=False)
    pictures = torch.stack([templates(name) for name in fonts])[font, labels].unsqueeze(1)
    images = F.grid_sample(pictures, grid, align_corners=False).flatten(1)
    return Glyphs(images + 0.15 * torch.randn(images.shape, generator=generator), labels)


def base_model(widths: tuple[int, ...], steps: int, rate: float = 2e-3) -> nn.Sequential:
    """Train a network with these hidden widths on upright characters without serifs."""
    sizes = (SIDE * SIDE, *widths, len(CHARACTERS))
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
        torch.manual_seed(0)
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for images, labels in glyphs(SANS, 20_000, seed=0).batches(128, steps, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model
