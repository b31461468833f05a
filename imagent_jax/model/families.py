"""Model families. Each is one package beside this module, `model/<model_type>/`, whose `FAMILY` says how it differs."""

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from imagent_jax.images.prepare import image_settings
from imagent_jax.model.config import TextConfig, VisionConfig, VLMConfig
from imagent_jax.model.vision import VisionTower


@dataclass(frozen=True)
class Family:
    """What a family of models has of its own.

    Attributes:
        model_type, architecture: as in its `config.json`.
        title: name in words, such as "Qwen2.5-VL".
        vision_act: `hidden_act` of the tower, as in `vision_config`.
        text, vision: functions that read the decoder's and the tower's configuration from `config.json` and `vision_config`.
        tower: class of the vision tower.
        older_names: the hub's files have the older tensor names (`checkpoint.older_name`).
        tensors: tensor in a checkpoint of every parameter, by dotted path: its name ({}: layer index), and whether the matrix is
            stored transposed, [out, in].
        sizes: `config.json` of every published size, by name.
    """

    model_type: str
    architecture: str
    title: str
    vision_act: str
    text: Callable[[dict[str, Any]], TextConfig]
    vision: Callable[[dict[str, Any]], VisionConfig]
    tower: type[VisionTower]
    older_names: bool
    tensors: Mapping[str, tuple[str, bool]]
    sizes: Mapping[str, dict[str, Any]]


class PublishedDecoder(NamedTuple):
    """A published decoder: width, MLP width, layers, query heads, key heads, vocabulary, and whether embeddings are tied."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False


def hub_config(model_type: str, architecture: str, decoder: PublishedDecoder, tower: dict[str, Any]) -> dict[str, Any]:
    """Return a `config.json` in the hub's flat form, as Qwen2-VL and Qwen2.5-VL have it, with `tower` as `vision_config`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": decoder.layers,
        "tie_word_embeddings": decoder.tied,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": tower,
    }


@functools.cache
def families() -> dict[str, Family]:
    """Return every family by `model_type`."""
    packages = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.ispkg]
    return {name: importlib.import_module(f"imagent_jax.model.{name}").FAMILY for name in packages}


def family_of(cfg: VLMConfig) -> Family:
    """Return the family of a model."""
    return families()[cfg.model_type]


def read_config(hf: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a parsed `config.json`.

    Raises:
        ValueError: another architecture, or an unsupported setting (named in the message).
    """
    known, kind = families(), hf.get("model_type")
    family = known.get(kind)
    if family is None or (hf.get("architectures") or [family.architecture]) != [family.architecture]:
        named = f" with architectures {hf['architectures']}" if hf.get("architectures") else ""
        readable = " and ".join(f"{one.architecture} ({name!r})" for name, one in known.items())
        raise ValueError(f"model_type is {kind!r}{named}; this loader reads {readable} checkpoints only.")
    if (act := hf["vision_config"].get("hidden_act", family.vision_act)) != family.vision_act:
        raise ValueError(f"hidden_act of the vision tower is {act!r}; {family.title} has {family.vision_act!r}.")
    text, vision = family.text(hf), family.vision(hf["vision_config"])
    if vision.hidden_size != text.hidden_size:
        raise ValueError(f"The vision tower gives features of width {vision.hidden_size}; the decoder's is {text.hidden_size}.")
    shapes = {name: family.text(size) for name, size in family.sizes.items()}
    published = (n for n, t in shapes.items() if (t.hidden_size, t.num_layers) == (text.hidden_size, text.num_layers))
    return VLMConfig(
        text,
        vision,
        image_token_id=hf["image_token_id"],
        vision_start_token_id=hf["vision_start_token_id"],
        vision_end_token_id=hf["vision_end_token_id"],
        model_type=hf["model_type"],
        name=next(published, f"{family.title} of another size"),
        hf=json.dumps(hf),
    )


def read_folder(folder: str | Path) -> VLMConfig:
    """Return the configuration of a folder with a `config.json`. Image mean and std come from its image settings, if any.

    Raises:
        ValueError: the file is missing or unreadable, or see `read_config`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; name a folder in Hugging Face's checkpoint form.")
    try:
        cfg = replace(read_config(json.loads(path.read_text())), folder=str(folder))
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; name a complete checkpoint.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    settings = image_settings(path.parent, {})
    own = {name: tuple(settings[name]) for name in ("image_mean", "image_std") if settings.get(name)}
    return replace(cfg, vision=replace(cfg.vision, **own))


def published_config(path: str) -> VLMConfig:
    """Return the configuration of a hub id such as "Qwen/Qwen2.5-VL-7B-Instruct", without files and without a network.

    Raises:
        ValueError: the id is not of a published size.
    """
    name = path.rpartition("/")[2].removesuffix("-Instruct")
    sizes = {size: hf for family in families().values() for size, hf in family.sizes.items()}
    if name not in sizes:
        raise ValueError(f"{path!r} is neither a folder nor a published size; name a folder, or one of {', '.join(sizes)}.")
    return read_config(sizes[name])
