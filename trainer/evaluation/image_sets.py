"""Sets of images to score: folders of images, what `bifrost generate` wrote, and shards.

Legend: B images of S x S pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ...data import BadSample, Dataset, open_dataset
from ...data.index import IMAGE_TYPES
from ...data.transforms import centre_square, resized
from ...data.units import counted
from ..errors import RunError
from ..inference.outputs import SHEET, read_record
from .samples import stack

STORED = 1 << 20
"""A side that no image has: JPEGs are decoded at their full size, since a score depends on how images are scaled."""
DECODERS = 8
"""Images decoded at once: decoding releases Python's lock."""


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order."""

    place: str
    """Where they are, for errors."""
    names: list[str]
    """File without its type, or key, of each image."""
    load: Callable[[int], bytes]
    """An image as stored."""
    prompts: list[str] | None = None
    """Prompt of each image, if `bifrost generate` made them."""

    def square(self, index: int, size: int | None) -> np.ndarray:
        """The centre square of one image, uint8 [S, S, 3], scaled to `size` unless that is None. RunError if it cannot
        be read."""
        try:
            found = centre_square(self.load(index), STORED)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.place}: {self.names[index]}: {_reason(error)}; replace or remove it") from error
        return found if size is None else resized(found, size)

    def batches(self, size: int, scaled: bool, batch: int, order: Sequence[int] | None = None) -> Iterator[Tensor]:
        """uint8 [B, 3, S, S] with S = `size`, in `order`. Unless `scaled`, RunError for an image of another size."""
        order = range(len(self.names)) if order is None else order
        with ThreadPoolExecutor(DECODERS) as pool:
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                squares = list(pool.map(lambda index: self.square(index, size if scaled else None), part))
                for index, found in zip(part, squares, strict=True):
                    if len(found) != size:
                        raise RunError(
                            f"{self.place}: {self.names[index]} has a side of {len(found)} pixels, the first generated"
                            f" image one of {size}: give a common --size"
                        )
                yield stack(squares)

    def order_of(self, names: Sequence[str]) -> list[int]:
        """Index of the image of each name; a number that `bifrost generate` put before a name is left out. RunError if
        one has none."""
        known = {name: index for index, name in enumerate(self.names)}
        found = []
        for name in names:
            index = known.get(name, known.get(name[6:] if name[:5].isdigit() and name[5:6] == "-" else name))
            if index is None:
                raise RunError(f"{self.place}: has no image named {name}: LPIPS compares images of the same name")
            found.append(index)
        return found


def open_images(given: str) -> ImageSet:
    """The images of a folder, or of shards. RunError or DataError if there are none."""
    folder = Path(given)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return open_folder(folder)
    return _of_shards(given, open_dataset(given))


def open_folder(folder: Path) -> ImageSet:
    """The images in `folder` and its folders, without the contact sheet; of a folder that `bifrost generate` wrote,
    those of its record. RunError if there are none, or some are missing."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give a folder of images")
    record = read_record(folder)
    files = [line["file"] for line in record] or sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in IMAGE_TYPES and path.name != SHEET and not path.name.startswith(".")
    )
    if not files:
        raise RunError(f"{folder}: no images ({', '.join(IMAGE_TYPES)}) in it or its folders")
    if grid := next((line["file"] for line in record if "seeds" in line), None):
        raise RunError(f"{folder}: {grid} has several images (--layout dpg); score a folder with one image per file")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise RunError(
            f"{folder}: {counted(len(missing), 'image')} of {len(files)} missing, such as {missing[0]}; run the same"
            " `bifrost generate` again, it resumes"
        )
    names = [file.rpartition(".")[0] for file in files]
    prompts = [line["prompt"] for line in record] or None
    return ImageSet(str(folder), names, lambda index: (folder / files[index]).read_bytes(), prompts)


def _of_shards(given: str, dataset: Dataset) -> ImageSet:
    places = [dataset.place(index) for index in range(len(dataset))]
    names = [dataset.entry(*place)[0] for place in places]

    def load(index: int) -> bytes:
        try:
            return dataset.read(*places[index]).image
        except BadSample as error:
            raise ValueError(str(error)) from error

    return ImageSet(given, names, load)


def _reason(error: OSError | ValueError) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)
