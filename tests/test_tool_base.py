"""The embedded base of the tool worlds: what it says of itself, its size, and its skills measured again in small."""

import json

import pytest

from imagent_jax.model import checkpoint
from imagent_jax.tiny.base import base_folder, tools_folder
from imagent_jax.tiny.recipe import RECIPES
from imagent_jax.tiny.skills_tools import measure


def test_it_was_built_by_one_command_within_its_time_and_size():
    built = json.loads((tools_folder() / "built.json").read_text())
    assert built["command"] == "python -m imagent_jax.tiny.recipe tools" and built["seconds"] <= 150 * 60
    files = [path for folder in (base_folder(), tools_folder()) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 24e6 and not any("state" in path.name for path in files)
    assert checkpoint.resolve("tiny_tools") == tools_folder() == base_folder().parent / RECIPES["tools"].folder


@pytest.mark.slow(60)
def test_it_writes_programs_repairs_searches_and_copies_answers():
    """In small, and near what it lists of itself."""
    built = json.loads((tools_folder() / "built.json").read_text())["skills"]
    measured = measure(tools_folder(), groups=8, seed=1, forms=("programs", "searches"))
    least = {
        "program on command": 0.95,
        "repair on command": 0.85,
        "read after: repair on command": 0.85,
        "search on command": 0.8,
        "search again": 0.8,
        "answer after: search on command": 0.7,
    }
    for skill, share in least.items():
        assert measured[skill] >= share and abs(measured[skill] - built[skill]) < 0.25, (skill, measured[skill], built[skill])
