"""The embedded base model: its tokenizer, its pre-training corpus, and where its files are."""

from pathlib import Path


def base_folder() -> Path:
    """The folder of the tiny base shipped with the package, in Hugging Face's form.

    Raises:
        ValueError: it is not there (a checkout in which it was not built yet).
    """
    folder = Path(__file__).parent / "assets" / "base"
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no model; build it with `python -m imagent_jax.tiny`.")
    return folder
