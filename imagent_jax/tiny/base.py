"""Locations of the embedded base models."""

from pathlib import Path


def base_folder() -> Path:
    """Return the folder of the tiny base shipped with the package, in Hugging Face's format.

    Raises:
        ValueError: the folder holds no model (a checkout in which the model has not been built).
    """
    return _folder("base", "python -m imagent_jax.tiny")


def tools_folder() -> Path:
    """Return the folder of the base of the tool worlds, see `base_folder`."""
    return _folder("tools", "python -m imagent_jax.tiny.recipe tools")


def _folder(name: str, command: str) -> Path:
    folder = Path(__file__).parent / "assets" / name
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no model; build it with `{command}`.")
    return folder
