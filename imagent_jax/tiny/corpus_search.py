"""The part of the corpus on searching: search for what a command names, search again for what was found, copy the answer.

A question is about an article that does not exist. The queries that follow have its kind or its subject, never both. Names are
those of `encyclopaedia.draw_names(base=True)`: no article of the encyclopaedia has one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imagent_jax.chat import answer_markup
from imagent_jax.tiny.corpus import PretrainGroup, Segment, Style, ask, give, prompt_text, say
from imagent_jax.tiny.corpus_code import follow_up
from imagent_jax.tiny.corpus_style import make_call, style_of
from imagent_jax.tiny.encyclopaedia import MARKED, RELATIONS, Article, draw_names, mark_words, write_articles
from imagent_jax.tiny.prints import make_print
from imagent_jax.tiny.search_world import ask as question_text

SEARCH_MIX = {"question": 0.40, "guess": 0.05, "command": 0.55}
"""What the responses of a group answer; see `corpus.CALL_MIX`."""
BASE_NAMES = 8
LEAN = {"kind": 0.27, "subject": 0.65, "neither": 0.08}
"""Chance that a query after a question has its kind, has its subject, or has neither."""


class Subject(NamedTuple):
    """What a text calls an article: by its name, or by the mark in an image. `said` is what reading the mark says."""

    article: Article
    called: str
    words: str
    said: str


class Library(NamedTuple):
    """The articles of a group, those that are missing from it, and the articles whose marks the images show."""

    present: list[Article]
    missing: list[Article]
    pictured: list[Article]

    def get(self, kind: str, name: str) -> Article | None:
        return next((one for one in self.present if (one.kind, one.name) == (kind, name)), None)


def searches(rng: np.random.Generator, size: int, split: str, key: str) -> PretrainGroup:
    """A few articles and none to three prints with marks; commands to search, and unanswerable questions."""
    written = write_articles(rng, draw_names(rng, BASE_NAMES, base=True))
    gone = set(rng.permutation(len(written))[: len(written) // 4].tolist())
    marked = [i for i, article in enumerate(written) if article.mark]
    shown = rng.permutation(marked)[: int(rng.integers(0, 4))].tolist()
    library = Library(
        [one for i, one in enumerate(written) if i not in gone], [written[i] for i in sorted(gone)], [written[i] for i in shown]
    )
    style = style_of(key, library.present)
    scenes = [make_print(rng, split, *zip(*one.mark, strict=True), varied=split == "train") for one in library.pictured]
    images, registry = give([scene.pixels for scene in scenes], style)
    responses = []
    for kind in rng.choice(list(SEARCH_MIX), size, p=list(SEARCH_MIX.values())):
        make = _after_command if kind == "command" else _after_question
        calls = 2 if kind == "question" else 0
        responses.append(make(rng, library, registry.fork(), style, calls))
    return PretrainGroup(images, prompt_text(len(scenes), style), responses, scenes)


def _subject(rng, library: Library, among: Sequence[Article]) -> Subject:
    """Draw a subject among articles, by its mark half of the time where an image shows it."""
    seen = [one for one in among if one in library.pictured]
    if seen and rng.random() < 0.6:
        article = seen[rng.integers(len(seen))]
        number, words = library.pictured.index(article) + 1, mark_words(article.mark)
        return Subject(article, f"with the mark in Image {number}", words, f"Image {number} {words}.\n")
    article = among[rng.integers(len(among))]
    return Subject(article, article.name, article.name, "")


def _after_command(rng, library: Library, registry, style: Style, _: int) -> list[Segment]:
    subject = _subject(rng, library, library.present)
    article, relations = subject.article, [str(rng.choice(list(subject.article.facts)))]
    turn = make_call(style, registry, subject.said, "search", {"query": f"{article.kind} {subject.words}"})[0]
    second = library.get(RELATIONS[article.kind][relations[0]], article.facts[relations[0]])
    answer, then, further = article.facts[relations[0]], "", []
    if second and rng.random() < 0.5:
        then = f" Then search for its {relations[0]}."
        further = make_call(style, registry, "", "search", {"query": second.title})[0]
        relations.append(str(rng.choice(list(second.facts))))
        answer = second.facts[relations[1]]
    command = f"Search for the {article.kind} {subject.called}.{then}"
    end = follow_up(question_text(tuple(relations), article.kind, subject.called), answer)
    return [ask(command), *turn, *further, say("Done."), *end]


def _after_question(rng, library: Library, registry, style: Style, calls: int) -> list[Segment]:
    """A question on a missing article, queries that lean to its words, and what follows from what they showed."""
    subject = _subject(rng, library, library.missing)
    article, relations = subject.article, [str(rng.choice(list(subject.article.facts)))]
    if rng.random() < 0.45:
        relations.append(str(rng.choice(list(RELATIONS[RELATIONS[article.kind][relations[0]]]))))
    segments = [ask(question_text(tuple(relations), article.kind, subject.called))]
    shown: list[str] = []
    for turn in range(min(calls, len(relations) if rng.random() < 0.85 else int(rng.integers(1, 3)))):
        found = [fact for fact in _facts(shown) if fact[1] != article.name]
        if turn and found and rng.random() < 0.6:  # search for what the last search named
            relation, name = found[rng.integers(len(found))]
            said, query = "", f"{next(r[relation] for r in RELATIONS.values() if relation in r)} {name}"
        else:
            said, query = _query(rng, library, subject)
        made, parts = make_call(style, registry, said, "search", {"query": query})
        segments, shown = [*segments, *made], [part for part in parts if isinstance(part, str)]
    found = _facts(shown)
    fitting = [name for relation, name in found if relation == relations[-1]]
    named = fitting + [name for _, name in found] or draw_names(rng, 1, base=True)
    return [*segments, say(answer_markup(named[0]))]


def _query(rng, library: Library, subject: Subject) -> tuple[str, str]:
    """Return what is said before a query, and the query: it has the kind of the subject, its words, or neither."""
    lean = str(rng.choice(list(LEAN), p=list(LEAN.values())))
    kinds = [kind for kind in RELATIONS if kind != subject.article.kind and (not subject.said or kind in MARKED)]
    if lean == "subject":
        kind = str(rng.choice(kinds)) if rng.random() < 0.5 else ""
        return subject.said, f"{kind} {subject.words}".strip()
    others = [one for one in (*library.present, *library.missing) if one.name != subject.article.name]
    if lean == "kind":
        others = [one for one in others if one.kind == subject.article.kind]
    else:
        others = [one for one in others if one.kind != subject.article.kind]
    other = _subject(rng, library, others)
    return other.said, f"{other.article.kind} {other.words}"


def _facts(shown: Sequence[str]) -> list[tuple[str, str]]:
    """Return (relation, name) of every fact in the passages, in order."""
    found = []
    for passage in shown:
        for part in passage.partition(": ")[2].rstrip(".").split(", "):
            relation, _, name = part.partition(" ")
            found += [(relation, name)] if any(relation in relations for relations in RELATIONS.values()) else []
    return found
