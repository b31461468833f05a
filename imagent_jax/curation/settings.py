"""Settings of curation, a section for each part, read from YAML and the command line as those of a run are."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from imagent_jax.config import read_own
from imagent_jax.config.loading import Loader, check_names, nearest, read_file
from imagent_jax.config.settings import Table, setting


@dataclass(frozen=True)
class RunSettings:
    """The run and where it writes."""

    out: str = setting("runs/curation", "folder of the run")
    seed: int = setting(0, "seed of groups, and of all that the agents are asked")
    proposals: int = setting(100, "questions to propose", least=1)
    parallel: int = setting(4, "questions in work at once", least=1)
    failures: int = setting(20, "proposals without an answer of an agent, in a row, after which the run stops", least=1)


@dataclass(frozen=True)
class PoolSettings:
    """The pictures."""

    path: str = setting("", "folder of pictures; a file, folder or hub id of rows with images; or tar shards, such as 'a-*.tar'")
    make: str = setting("", "'package.module:function' that writes the folder `path` where it is missing: (folder, count, seed)")
    make_count: int = setting(200, "pictures that `make` writes", least=1)
    licence: str = setting("unknown", "licence of pictures for which no column or licences.csv names one")
    near: bool = setting(True, "drop near duplicates, not just files that are equal")
    least_side: int = setting(64, "pixels of the shorter side of a picture; smaller ones are left out", least=1)


@dataclass(frozen=True)
class GroupSettings:
    """The image groups that questions are about. No picture is in two groups."""

    sizes: tuple[int, ...] = setting((2, 3, 4), "numbers of images of a group, from 2 to 8, each as often")
    ways: dict[str, float] = setting(
        Table(similar=1.0, random=1.0), "share of groups by 'similar', 'random', or a column of the pictures' facts", hash=False
    )
    embedding: str = setting("", "'package.module:function' from a PIL image to a vector ('': colours and edges)")


@dataclass(frozen=True)
class AgentSettings:
    """Who plays which role."""

    backend: str = setting("endpoint", "'endpoint', or your own 'package.module:Class' (docs/mifg_qa.md)")
    settings: dict[str, Any] = setting(Table(), "settings of the backend's own", hash=False)
    roles: dict[str, dict[str, Any]] = setting(
        Table(), "other backends by role, such as {proposer: {backend: endpoint, settings: {model: a}}}", hash=False
    )
    prompts: str = setting("", "folder of prompts of your own; a file that is not there is taken from the package")
    with_tools: int = setting(2, "blind answerers that may ask for crops", least=0)
    without_tools: int = setting(1, "blind answerers that see the images once", least=0)
    looks: int = setting(3, "crops that an answerer may ask for", least=0)
    repairs: int = setting(1, "rounds of repair of a question in which something is found", least=0)
    options: int = setting(0, "options of a question, by the distractor writer (0: open questions)", least=0, most=26)


@dataclass(frozen=True)
class FilterSettings:
    """What is kept."""

    agreement: float = setting(0.6, "least share of the blind answerers whose answer is the claimed one", least=0, most=1)
    stop_early: bool = setting(True, "ask no further agent about a question in which something is found")
    largest_box: float = setting(0.5, "largest area of a box, as a share of its image", above=0, most=1)
    crop_margin: float = setting(0.02, "margin around a box in the crop that is checked, as a share of the image's side", least=0)
    crop_side: int = setting(336, "pixels to which the shorter side of a small crop is enlarged", least=1)
    same_text: float = setting(0.85, "share of common words from which questions about the same images are one", above=0, most=1)
    balance: float = setting(3.0, "times that an answer of a kind may stand above its even share", least=1)
    benchmarks: tuple[str, ...] = setting((), "folders or files of benchmarks whose images and questions may not occur")
    ngram: int = setting(8, "words in a row that a question may not share with a benchmark's", least=1)


@dataclass(frozen=True)
class DifficultySettings:
    """How often the policy is right."""

    on: bool = setting(False, "measure pass rates, and drop questions that are always or never answered right")
    policy: str = setting(
        "imagent_jax.curation.difficulty:PolicyRates", "'package.module:Class' that measures pass rates (docs/mifg_qa.md)"
    )
    settings: dict[str, Any] = setting(Table(), "settings of its own", hash=False)
    rollouts: int = setting(4, "answers to a question, each with and without tools", least=2)


@dataclass(frozen=True)
class ReleaseSettings:
    """The data set."""

    title: str = setting("MIFG-QA", "title of the card")
    version: str = setting("1.0.0", "version of the data set, three numbers")
    test: float = setting(0.1, "share of questions in the test split", least=0, below=1)
    reviewers: int = setting(0, "reviewers that a question needs to be released (0: none, all that the filters kept)", least=0)


@dataclass(frozen=True)
class Curation:
    """All settings of curation."""

    run: RunSettings = RunSettings()
    pool: PoolSettings = PoolSettings()
    groups: GroupSettings = GroupSettings()
    agents: AgentSettings = AgentSettings()
    filters: FilterSettings = FilterSettings()
    difficulty: DifficultySettings = DifficultySettings()
    release: ReleaseSettings = ReleaseSettings()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curation:
        """Return the settings of nested dictionaries; what is missing keeps its default.

        Raises:
            ValueError: an unknown section or setting (the nearest is named), or values that cannot be.
        """
        check_names(values, setting_names())
        sections = typing.get_type_hints(cls)
        made = cls(**{name: read_own(kind, values.get(name, {}), name) for name, kind in sections.items()})
        made.check()
        return made

    def check(self) -> None:
        """Raise ValueError for values that cannot be; the sentence says what to change."""
        if not self.groups.sizes or not all(2 <= size <= 8 for size in self.groups.sizes):
            raise ValueError(f"groups.sizes is {list(self.groups.sizes)}; a group has 2 to 8 images.")
        if not self.groups.ways or not all(0 < share < math.inf for share in self.groups.ways.values()):
            raise ValueError(f"groups.ways is {dict(self.groups.ways)}; give each way a share above 0.")
        if not self.pool.path:
            raise ValueError("pool.path is empty; name a folder of pictures, a data set, or tar shards.")
        if self.agents.with_tools + self.agents.without_tools == 0:
            raise ValueError("There is no blind answerer; set agents.with_tools or agents.without_tools to at least 1.")
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.release.version):
            raise ValueError(f"release.version is {self.release.version!r}; write three numbers, such as '1.0.0'.")
        if self.agents.options == 1:
            raise ValueError("agents.options is 1; a choice has at least 2 options, or set 0 for open questions.")

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values, the inverse of `from_dict`."""
        return _plain(dataclasses.asdict(self))


def setting_names() -> list[str]:
    """Return the dotted names of all settings."""
    return [f"{name}.{f.name}" for name, kind in typing.get_type_hints(Curation).items() for f in dataclasses.fields(kind)]


def read_arguments(files: Sequence[str], overrides: Sequence[str]) -> Curation:
    """Return the settings of YAML files, in order, and of `--section.key VALUE` (or `=VALUE`), which win.

    Raises:
        ValueError: a file cannot be read, an option has no value, or see `Curation.from_dict`.
    """
    values: dict[str, dict[str, Any]] = {}
    for file in files:
        given = read_file(file)
        check_names(given, setting_names())
        values = {section: values.get(section, {}) | given.get(section, {}) for section in [*values, *given]}
    left = list(overrides)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            raise ValueError(f"{name!r} is no option; write --section.key VALUE, such as --run.proposals 100.")
        if not equals and not left:
            raise ValueError(f"{name} needs a value, as in {name}=VALUE.")
        section, _, key = name[2:].partition(".")
        if f"{section}.{key}" not in setting_names():
            raise ValueError(f"There is no setting {name[2:]!r}; {nearest(name[2:], setting_names())}")
        values.setdefault(section, {})[key] = _value_of(value if equals else left.pop(0))
    return Curation.from_dict(values)


def _value_of(text: str) -> Any:
    """Return a value of the command line; what is not YAML, such as *.tar, is text."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value
