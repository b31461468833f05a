"""Makes `assets/` from the images that scikit-image and scikit-learn ship: `python -m imagent_jax.tiny.make_assets`.

The result is part of the package, so this needs running only to change the assets. It needs scikit-image and
scikit-learn, which nothing else in the package does. `assets/README.md` lists sources and licences.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from PIL import Image

ASSETS = pathlib.Path(__file__).parent / "assets" / "world"
TRAIN = ("astronaut", "brick", "cell", "chelsea", "china", "clock", "grass", "hubble_deep_field", "retina", "rocket")
PHOTOS = {"train": TRAIN, "test": ("camera", "coffee", "flower", "gravel")}
MAX_SIDE = 560
TEST_DIGITS = 497


def load_photo(name: str) -> Image.Image:
    """The photograph called `name`, from scikit-learn or scikit-image, as RGB."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def write_photos(folder: pathlib.Path) -> int:
    """Writes `<split>_<name>.jpg` for every photograph; returns the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for split, names in PHOTOS.items():
        for name in names:
            photo = load_photo(name)
            photo.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            path = folder / f"{split}_{name}.jpg"
            photo.save(path, "JPEG", quality=85, optimize=True)
            total += path.stat().st_size
    return total


def write_digits(path: pathlib.Path) -> int:
    """Writes the 1797 digits, split stratified by label with a fixed seed; returns the bytes written.

    Arrays per split: `<split>_images` uint8[n, 8, 8] with values 0..16, `<split>_labels` uint8[n],
    `<split>_rows` int16[n] (row in scikit-learn's data set).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(np.arange(len(data.target)), test_size=TEST_DIGITS, stratify=data.target, random_state=0)
    arrays: dict[str, Any] = {}
    for split, rows in (("train", np.sort(train)), ("test", np.sort(test))):
        arrays[f"{split}_images"] = data.images[rows].astype(np.uint8)
        arrays[f"{split}_labels"] = data.target[rows].astype(np.uint8)
        arrays[f"{split}_rows"] = rows.astype(np.int16)
    np.savez_compressed(path, **arrays)
    return path.stat().st_size


def main() -> None:
    """Writes the photographs and the digits and prints their sizes."""
    photos = write_photos(ASSETS / "photos")
    digits = write_digits(ASSETS / "digits.npz")
    print(f"photographs: {photos} bytes; digits: {digits} bytes")


if __name__ == "__main__":
    main()
