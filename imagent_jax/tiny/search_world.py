"""The search world: questions that only the encyclopaedia answers, about names in the text and about marks in pictures.

One hop reads, searches and answers. Two hops search again for what the first search named.
"""

import dataclasses

import numpy as np

from imagent_jax.tiny import world
from imagent_jax.tiny.encyclopaedia import MARKED, RELATIONS, TRAIN_NAMES, Article, articles
from imagent_jax.tiny.generated import cycle_of, encode_png
from imagent_jax.tiny.prints import make_print
from imagent_jax.types import Task

KIND_MIX = {"name_once": 2, "name_twice": 2, "mark_once": 4, "mark_twice": 2}
"""Tasks of each kind in every 10: about a name or a mark, with one hop or two."""


def ask(relations: tuple[str, ...], kind: str, subject: str) -> str:
    """Return a question for the fact at the end of a chain of relations: ("captain", "home") for the captain's home."""
    chain = " of the ".join(reversed(relations))
    return f"Name the {chain} of the {kind} {subject}."


def make_task(rng: np.random.Generator, split: str, kind: str) -> Task:
    """Draw a question. `task.meta` holds the split, the titles of the articles that it needs, in order (`needs`), and, with
    pictures, their tags and the number of the picture with the mark (`targets`)."""
    found = articles()
    names = list(dict.fromkeys(name for _, name in found))
    names = names[:TRAIN_NAMES] if split == "train" else names[TRAIN_NAMES:]
    marked = kind.startswith("mark")
    subject = found[str(rng.choice(MARKED if marked else list(RELATIONS))), str(rng.choice(names))]
    chain, relations = [subject], []
    for _ in range(2 if kind.endswith("twice") else 1):
        here = chain[-1]
        relations.append(str(rng.choice(list(here.facts))))
        chain.append(found[RELATIONS[here.kind][relations[-1]], here.facts[relations[-1]]])
    meta = {"split": split, "needs": [article.title for article in chain[:-1]]}
    images: tuple[bytes, ...] = ()
    question = ask(tuple(relations), subject.kind, subject.name)
    if marked:
        count, at = int(rng.integers(1, 4)), 0
        at = int(rng.integers(count))
        shown = [subject if n == at else _other(rng, names, subject) for n in range(count)]
        drawn = [tuple(zip(*article.mark, strict=True)) for article in shown]
        scenes = [make_print(rng, split, colours, digits) for colours, digits in drawn]
        images = tuple(encode_png(scene.pixels) for scene in scenes)
        meta |= {"targets": [at + 1], "tags": [[dataclasses.asdict(tag) for tag in scene.tags] for scene in scenes]}
        question = ask(tuple(relations), subject.kind, f"with the mark in Image {at + 1}")
    return Task("", question, images, chain[-1].name, "exact", kind, meta)


def _other(rng: np.random.Generator, names: list[str], subject: Article) -> Article:
    """Draw an article with another mark."""
    while True:
        article = articles()[str(rng.choice(MARKED)), str(rng.choice(names))]
        if {*article.mark} != {*subject.mark}:
            return article


def task_at(seed: int, split: str, index: int) -> Task:
    """Return task number `index` of the series that `seed` and `split` name, see `code_world.task_at`."""
    kind, rng = cycle_of(KIND_MIX, world.SPLITS.index(split), seed, index)
    return dataclasses.replace(make_task(rng, split, kind), uid=f"tiny_search/{split}/{seed}/{index}")
