"""Location of the embedded base model."""

from pathlib import Path


def base_folder() -> Path:
    """Return the folder of the tiny base shipped with the package, in Hugging Face's format.

    Raises:
        ValueError: the folder holds no model (a checkout in which the model has not been built).
    """
    folder = Path(__file__).parent / "assets" / "base"
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no model; build it with `python -m imagent_jax.tiny`.")
    return folder
