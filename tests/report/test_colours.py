"""The colours of curves: they stand out, and differ for people who see fewer of them."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

PALETTE = Path(__file__).parents[2] / "spell_megatron" / "report" / "page" / "page.css"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_of_curves_differ_for_everybody(theme):
    """Seen as people without one kind of cones see them (Machado et al. 2009), in OKLab; and they stand out."""
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", PALETTE.read_text())
    colours = {name: _linear(pair[theme == "dark"]) for name, *pair in found}
    bright = {name: colour @ (0.2126, 0.7152, 0.0722) + 0.05 for name, colour in colours.items()}
    together = ("blue", "orange", "green", "purple", "red", "grey")  # outcomes, roles, the first runs
    for name in together:
        contrast = bright[name] / bright["panel"]
        assert max(contrast, 1 / contrast) >= 3, name
    for kind, cones in CONES.items():
        seen = {name: _oklab(np.clip(np.array(cones) @ colours[name], 0, 1)) for name in together}
        for one, other in combinations(together, 2):
            assert np.linalg.norm(seen[one] - seen[other]) > 0.07, (kind, one, other)


CONES = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def _linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb."""
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    cones.append([0.0883024619, 0.2817188376, 0.6299787005])
    opponents = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
    opponents.append([0.0259040371, 0.7827717662, -0.808675766])
    return np.array(opponents) @ np.cbrt(np.array(cones) @ rgb)
