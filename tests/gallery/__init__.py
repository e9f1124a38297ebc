"""A gallery of architectures at small sizes, in plain torch: what `docs/zoo.md` lists and what its test reads."""

from __future__ import annotations

from gallery.dense import DENSE
from gallery.images import IMAGES
from gallery.lipschitz import LIPSCHITZ
from gallery.parts import Specimen
from gallery.science import SCIENCE
from gallery.series import SERIES_MODELS

__all__ = ["FAMILIES", "GALLERY"]

FAMILIES: dict[str, dict[str, Specimen]] = {
    "Images and videos": IMAGES,
    "Dense prediction and generative models": DENSE,
    "Series, sound, text, control": SERIES_MODELS,
    "Physics, algorithms, shapes, sets and graphs": SCIENCE,
    "Layers of known constant": LIPSCHITZ,
}

GALLERY: dict[str, Specimen] = {name: specimen for family in FAMILIES.values() for name, specimen in family.items()}
