"""The part of the corpus that is only text: readings or passages that the user tells, and a question that they answer.

What an answer needs after its calls is learned here without them: to find what is asked for in what stands there, to copy it,
to add. Nothing is called, and no image is shown, so an update costs little.
"""

import numpy as np

from imagent_jax.chat import answer_markup
from imagent_jax.tiny.corpus import PretrainGroup, Segment, Style, about, ask, compare_question, prompt_text, reading_of, say
from imagent_jax.tiny.corpus_search import BASE_NAMES
from imagent_jax.tiny.encyclopaedia import MARKED, RELATIONS, Article, draw_names, mark_words, write_articles
from imagent_jax.tiny.search_world import ask as question_text
from imagent_jax.tiny.world import COLOURS, Tag

READ = "Read this."
IMAGES = 5
"""Readings are of images with numbers up to this."""
COMPARED = 0.3
"""Chance that a question compares two tags of one colour, where there are any."""
BY_MARK = 0.4
"""Chance that a ship or a star is asked for by its mark."""


def told(rng: np.random.Generator, size: int, style: Style) -> PretrainGroup:
    """A group without images: all its responses are on readings, or on passages about the same few names."""
    articles = write_articles(rng, draw_names(rng, BASE_NAMES, base=True))
    readings = rng.random() < 0.5
    responses = [_on_readings(rng) if readings else _on_passages(rng, articles) for _ in range(size)]
    return PretrainGroup([], prompt_text(0, style), responses, [])


def _on_readings(rng: np.random.Generator) -> list[Segment]:
    """Two to four readings in any order, a question about them, the readings that it needs, and its answer."""
    numbers = rng.permutation(IMAGES)[: int(rng.integers(2, 5))] + 1
    colours = rng.permutation(COLOURS)[: int(rng.integers(1, 4))]
    seen = [(int(n), Tag(str(rng.choice(colours)), int(rng.integers(10)), 0.5, 0.5)) for n in numbers]
    pairs = [(a, b) for a in seen for b in seen if a[1].colour == b[1].colour and a[1].digit > b[1].digit]
    if pairs and rng.random() < COMPARED:
        pair = pairs[rng.integers(len(pairs))]
        (a, first), (b, second) = (pair[i] for i in rng.permutation(2))
        question, evidence = compare_question(first.colour, a, b), reading_of(a, first) + reading_of(b, second)
        answer = f"Image {pair[0][0]}"
    else:
        question, evidence, answer = about(rng, seen)
    lines = "".join(reading_of(n, tag) for n, tag in seen)
    return [_asked(rng, question, lines), say(evidence + answer_markup(answer))]


def _on_passages(rng: np.random.Generator, articles: list[Article]) -> list[Segment]:
    """What one search or two would show, a question that its articles answer in one step or two, and the answer."""
    first = articles[rng.integers(len(articles))]
    relations, lines = [str(rng.choice(list(first.facts)))], _shown(rng, first, articles)
    answer, called = first.facts[relations[0]], first.name
    if first.kind in MARKED and rng.random() < BY_MARK:
        number = int(rng.integers(IMAGES)) + 1
        called = f"with the mark in Image {number}"
        lines = [f"Image {number} {mark_words(first.mark)}.", *lines]
    if rng.random() < 0.5:
        title = f"{RELATIONS[first.kind][relations[0]]} {answer}"
        second = next(one for one in articles if one.title == title)
        relations.append(str(rng.choice(list(second.facts))))
        lines, answer = [*lines, *_shown(rng, second, articles)], second.facts[relations[1]]
    question = question_text(tuple(relations), first.kind, called)
    return [_asked(rng, question, "".join(f"{line}\n" for line in lines)), say(answer_markup(answer))]


def _asked(rng: np.random.Generator, question: str, lines: str) -> Segment:
    """The user's turn: a question before or after the lines that answer it."""
    return ask(f"{READ}\n{lines}{question}" if rng.random() < 0.5 else f"{question}\n{READ}\n{lines.rstrip()}")


def _shown(rng: np.random.Generator, article: Article, articles: list[Article]) -> list[str]:
    """Return two passages, of an article and of another with its kind or its name; the article comes first as a rule."""
    near = [one for one in articles if (one.kind == article.kind) != (one.name == article.name)]
    lines = [article.text, near[rng.integers(len(near))].text]
    return lines if rng.random() < 0.7 else lines[::-1]
