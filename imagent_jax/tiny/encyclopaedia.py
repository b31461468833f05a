"""The encyclopaedia of the search world: 3,200 invented articles on ships, stars, persons and places.

Every name is that of a ship, a star, a person and a place, so a query that lacks the kind finds others. Ships and stars bear
marks of two coloured digits; many marks share a half. Facts are names, drawn at random: they follow from nothing. Text that the
tiny base is trained on has names of its own (`base_names`), so no answer stands in it.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from imagent_jax.tiny.world import COLOURS
from imagent_jax.tools.search.index import build

SYLLABLES = tuple(c + v for c in "bdklmnrstv" for v in "aeio")
RELATIONS = {
    "ship": {"captain": "person", "port": "place"},
    "star": {"finder": "person", "zenith": "place"},
    "person": {"vessel": "ship", "home": "place"},
    "place": {"ruler": "person", "beacon": "star"},
}
"""By kind of article: its facts, each with the kind of what it names. None names its own kind."""
MARKED = ("ship", "star")
NAMES = 800
TRAIN_NAMES = 600
"""Training questions are about the first names, held-out questions about the others."""
CACHE = "~/.cache/imagent_jax/search"

Mark = tuple[tuple[str, int], ...]
"""Colour and digit of the left tag and of the right; (): none."""


@dataclass(frozen=True)
class Article:
    """An article. `facts` maps relations to names; Persons and places bear no `mark`."""

    kind: str
    name: str
    facts: dict[str, str]
    mark: Mark = ()

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def text(self) -> str:
        """All of the article on one line, its title first."""
        mark = f"mark {mark_words(self.mark)}, " if self.mark else ""
        return f"{self.title}: {mark}{', '.join(f'{relation} {name}' for relation, name in self.facts.items())}."

    @property
    def id(self) -> str:
        """Decides between equal scores: an order that follows from neither kind nor name."""
        return f"{zlib.crc32(self.title.encode()):08x}"


def mark_words(mark: Mark) -> str:
    """Return a mark as it is written: "red7 blue3"."""
    return " ".join(f"{colour}{digit}" for colour, digit in mark)


def name_of(number: int) -> str:
    """Return name `number`, three syllables, of `len(SYLLABLES)` ** 3."""
    n = len(SYLLABLES)
    return "".join(SYLLABLES[number // n**place % n] for place in (2, 1, 0)).capitalize()


def is_base(number: int) -> bool:
    """Return whether a name is one for pre-training: a quarter of all are."""
    n = len(SYLLABLES)
    return sum(number // n**place % n for place in range(3)) % 4 == 0


def draw_names(rng: np.random.Generator, count: int, base: bool) -> list[str]:
    """Draw different names, for pre-training (`base`) or for the encyclopaedia."""
    names: dict[str, None] = {}
    while len(names) < count:
        number = int(rng.integers(len(SYLLABLES) ** 3))
        if is_base(number) == base:
            names[name_of(number)] = None
    return list(names)


def draw_marks(rng: np.random.Generator, count: int) -> list[Mark]:
    """Draw marks of which no two have the same two tags, in any order."""
    keys = [((a, i), (b, j)) for a, b in combinations(COLOURS, 2) for i in range(10) for j in range(10)]
    chosen = (keys[i] for i in rng.permutation(len(keys))[:count])
    return [mark if rng.random() < 0.5 else mark[::-1] for mark in chosen]


def write_articles(rng: np.random.Generator, names: Sequence[str]) -> list[Article]:
    """Write an article of every kind for every name; facts are drawn from the names."""
    articles = []
    for kind, relations in RELATIONS.items():
        marks = draw_marks(rng, len(names)) if kind in MARKED else [()] * len(names)
        for name, mark in zip(names, marks, strict=True):
            others = [names[i] for i in rng.choice(len(names), len(relations) + 1, replace=False)]
            facts = dict(zip(relations, [other for other in others if other != name], strict=False))
            articles.append(Article(kind, name, facts, mark))
    return articles


@functools.cache
def articles() -> dict[tuple[str, str], Article]:
    """Return the encyclopaedia by kind and name, in order of kinds, then of names as they were drawn."""
    rng = np.random.default_rng(17)
    return {(article.kind, article.name): article for article in write_articles(rng, draw_names(rng, NAMES, base=False))}


def index_folder(root: str = CACHE) -> str:
    """Return the folder of the encyclopaedia's index; the first use builds it.

    Raises:
        ValueError: tantivy is not installed, or the folder cannot be written.
    """
    rows = [(article.id, article.title, article.text) for article in articles().values()]
    folder = Path(root).expanduser() / f"tiny-{zlib.crc32(repr(rows).encode()):08x}"
    if not folder.is_dir():
        try:
            build(rows, folder)
        except OSError as error:
            if not folder.is_dir():  # otherwise another process was first
                raise ValueError(f"The index of the tiny encyclopaedia cannot be written to {root} ({error.strerror}).") from None
    return str(folder)
