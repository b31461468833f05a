"""The embedded base of the tool worlds: what it says of itself, its size, and its skills measured again in small."""

import json

import pytest

from imagent_jax.model import checkpoint
from imagent_jax.tiny.base import base_folder, tools_folder
from imagent_jax.tiny.recipe import RECIPES
from imagent_jax.tiny.skills_tools import measure

FORMS = ("prints", "programs", "searches")


def test_it_was_built_by_one_command_within_its_time_and_size():
    built = json.loads((tools_folder() / "built.json").read_text())
    assert built["command"] == "python -m imagent_jax.tiny.recipe tools" and built["seconds"] <= 150 * 60
    files = [path for folder in (base_folder(), tools_folder()) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 24e6 and not any("state" in path.name for path in files)
    assert checkpoint.resolve("tiny_tools") == tools_folder() == base_folder().parent / RECIPES["tools"].folder


@pytest.mark.slow(60)
def test_its_skills_are_those_it_lists():
    """In small: 8 groups of three forms. A skill of a share p of n pieces lies within three standard deviations."""
    built = json.loads((tools_folder() / "built.json").read_text())["skills"]
    measured = measure(tools_folder(), groups=8, seed=1, forms=FORMS)
    assert {"see what is wrong", "program on command", "repair on command", "search on command"} <= set(measured)
    for skill, share in measured.items():
        assert abs(share - built[skill]) < 0.35, (skill, share, built[skill])
    for skill, least in {"program on command": 0.8, "repair on command": 0.7, "search on command": 0.7}.items():
        assert measured[skill] >= least, (skill, measured[skill])
