"""What the tests of curation share: pictures of the tiny world, small settings, questions."""

from pathlib import Path
from typing import Any

from imagent_jax.curation.question import Evidence, Question
from imagent_jax.curation.settings import Curation
from imagent_jax.tiny.curators import make_pictures

ROOT = Path(__file__).parent.parent


def tiny_values(folder: Path, **sections: Any) -> dict[str, dict[str, Any]]:
    """Settings of a small run on pictures in `folder`, which `tiny_pictures` writes."""
    values: dict[str, dict[str, Any]] = {
        "run": {"out": str(folder / "run"), "proposals": 12, "parallel": 2},
        "pool": {"path": str(folder / "pictures")},
        "agents": {
            "backend": "imagent_jax.tiny.curators:TinyCurators",
            "settings": {"folders": [str(folder / "pictures"), str(folder / "pictures_test")]},
        },
        "filters": {"benchmarks": [str(folder / "pictures_test")], "crop_side": 1},
        "release": {"test": 0.3},
    }
    for name, own in sections.items():
        values.setdefault(name, {}).update(own)
    return values


def tiny_settings(folder: Path, **sections: Any) -> Curation:
    return Curation.from_dict(tiny_values(folder, **sections))


def tiny_pictures(folder: Path, count: int = 16) -> Path:
    make_pictures(folder / "pictures", count, 0)
    return folder


def ask(text: str, answer: str, **fields: Any) -> Question:
    """A question about the images a and b."""
    values = {"uid": "q", "images": ("a", "b"), "kind": "read", "evidence": (Evidence(1, (0, 0, 100, 100), "What?", "7"),)}
    return Question(text=text, answer=answer, **{**values, **fields})
