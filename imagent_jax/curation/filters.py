"""Filters of questions: those of one question, which look at it or ask agents about it, and those that compare all questions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from imagent_jax.curation.likeness import Known, Look, look_of
from imagent_jax.curation.pool import Pool, pictures_of, sources_of
from imagent_jax.curation.question import SIDE, Event, Evidence, Question
from imagent_jax.curation.roles import Roles
from imagent_jax.curation.settings import AgentSettings, FilterSettings
from imagent_jax.images.decode import read_image
from imagent_jax.scoring import normalise, score

FILTERS = {
    "schema": "the proposal is no question: a place is missing or empty, or the answer is not of its type",
    "benchmark": "an image or the wording is of a benchmark",
    "answer_in_question": "the question contains its answer",
    "box": "a box is too large, or its crop does not show what it should",
    "needs_images": "the text alone gives the answer",
    "needs_several": "one image alone gives the answer, though several are claimed",
    "agreement": "blind answerers do not agree with the answer",
    "other_answer": "another answer can be defended",
    "vague": "a reference is unclear",
    "options": "the options are not usable",
    "duplicate": "the same question about the same images is there already",
    "balance": "its answer is too frequent among questions of its kind",
    "difficulty": "the policy is always or never right, and tools do not help",
}
"""What each filter drops, in the order in which they act."""
BENCHMARK_SPLITS = ("train", "validation", "val", "dev", "test")
"""Splits of a benchmark whose images and questions may not occur."""
UNMENDABLE = {"benchmark", "options"}
"""Filters whose findings no repairer can mend."""


def dropped(question: Question, name: str, why: str) -> Question:
    """Return the question as dropped by a filter."""
    return question.after(Event(f"filter:{name}", "dropped", {"why": why}))


# ---- one question -----------------------------------------------------------------------------------------------------


class Checks:
    """The filters of one question.

    Args:
        benchmarks: what may not occur.
    """

    def __init__(self, roles: Roles, agents: AgentSettings, cfg: FilterSettings, benchmarks: Benchmarks):
        self.roles, self.agents, self.cfg, self.benchmarks = roles, agents, cfg, benchmarks

    def find(self, question: Question) -> tuple[Question, list[tuple[str, str]]]:
        """Return the question with what the agents said, and what was found: filters and reasons. Cheap filters come first.

        Raises:
            AgentError: an agent gave no answer.
        """
        found: list[tuple[str, str]] = []
        steps: tuple[Callable[[Question], tuple[list[Event], list[tuple[str, str]]]], ...] = (
            self._still,
            self._text,
            self._boxes,
            self._single,
            self._answers,
            self._attack,
        )
        for step in steps:
            events, more = step(question)
            events += [Event(f"filter:{name}", "found", {"why": why}) for name, why in more]
            question = replace(question, history=(*question.history, *events))
            found += more
            if found and self.cfg.stop_early:
                break
        return question, found

    def _still(self, question: Question) -> tuple[list[Event], list[tuple[str, str]]]:
        found = []
        if where := self.benchmarks.has(question):
            found.append(("benchmark", where))
        if 0 < len(question.options) < self.agents.options:
            found.append(("options", f"there are {len(question.options)} that differ, not {self.agents.options}"))
        elif why := question.options_fault():
            found.append(("options", why))
        if answer_in_text(question):
            found.append(("answer_in_question", f"the question says {question.answer!r}"))
        for place in question.evidence:
            if (share := _area(place) / SIDE**2) > self.cfg.largest_box:
                found.append(("box", f"the box {list(place.box)} covers {100 * share:.0f} % of Image {place.image}"))
                break
        return [], found

    def _text(self, question: Question) -> tuple[list[Event], list[tuple[str, str]]]:
        answer, sure = self.roles.from_text(question)
        facts = {"with": "text", "answer": answer, "sure": sure, "right": question.right(answer)}
        found = [("needs_images", f"the text alone gives {answer!r}")] if sure and facts["right"] else []
        return [Event("attacker", "attacked", facts)], found

    def _boxes(self, question: Question) -> tuple[list[Event], list[tuple[str, str]]]:
        events = []
        for place in question.evidence:
            answer = self.roles.read(question, place)
            events.append(Event("attacker", "read", {"image": place.image, "box": [*place.box], "answer": answer}))
            if not same(answer, place.shows):
                why = f"the crop {list(place.box)} of Image {place.image} shows {answer!r}, not {place.shows!r}"
                return events, [("box", why)]
        return events, []

    def _single(self, question: Question) -> tuple[list[Event], list[tuple[str, str]]]:
        events, found = [], []
        for number in range(1, len(question.images) + 1) if question.several else ():
            answer, sure = self.roles.from_image(question, number)
            facts = {"with": f"Image {number}", "answer": answer, "sure": sure, "right": question.right(answer)}
            events.append(Event("attacker", "attacked", facts))
            if sure and facts["right"]:
                found.append(("needs_several", f"Image {number} alone gives {answer!r}"))
                break
        return events, found

    def _answers(self, question: Question) -> tuple[list[Event], list[tuple[str, str]]]:
        events, hits = [], 0
        count = self.agents.with_tools + self.agents.without_tools
        for number in range(count):
            looks = self.agents.looks if number < self.agents.with_tools else 0
            answer, used = self.roles.answer(question, f"answerer {number + 1}", looks)
            hit = question.right(answer)
            hits += hit
            facts = {"answer": answer, "right": hit, "looks": used, "tools": looks > 0}
            events.append(Event(f"answerer {number + 1}", "answered", facts))
        if hits / count < self.cfg.agreement:
            said = Counter(event.facts["answer"] for event in events).most_common(1)[0][0]
            return events, [("agreement", f"{hits} of {count} blind answerers agree; most say {said!r}")]
        return events, []

    def _attack(self, question: Question) -> tuple[list[Event], list[tuple[str, str]]]:
        found = self.roles.attack(question)
        other = "" if found["other"] and same(found["other"], question.answer) else found["other"]
        hits = [("other_answer", f"{other!r} can be defended: {found['why']}")] if other else []
        hits += [("vague", found["why"])] if found["vague"] else []
        return [Event("attacker", "attacked", {"with": "all", **found})], hits


def same(answer: str, claim: str) -> bool:
    """Return whether two short answers say the same: as numbers, else as words without articles and punctuation."""
    try:
        if score(answer, claim, "number") == 1:
            return True
    except ValueError:  # the claim is no number
        pass
    return bool(normalise(claim)) and normalise(answer) == normalise(claim)


def _area(place: Evidence) -> int:
    left, top, right, bottom = place.box
    return (right - left) * (bottom - top)


def answer_in_text(question: Question) -> bool:
    """Return whether the text gives its answer away.

    Names of images do not count, unless the answer is an image: then it is given away where it is named more often than any other
    image; an order of images, where all are named again. Yes and no in "yes or no" do not count either.
    """
    if question.options:
        return False
    named = Counter(re.findall(r"\bImage \d+", question.text))
    if re.fullmatch(r"Image \d+", question.answer):
        most = max((n for name, n in named.items() if name != question.answer), default=0)
        return named[question.answer] > most
    if re.fullmatch(r"(Image \d+,? ?(and )?)+", question.answer):
        return question.answer in question.text and min(named.values()) > 1
    words = normalise(re.sub(r"\bImage \d+|\byes or no\b|\bno or yes\b", " ", question.text)).split()
    wanted = normalise(question.answer).split()
    places = [i for i in range(len(words) - len(wanted) + 1) if wanted and words[i : i + len(wanted)] == wanted]
    return any(i == 0 or words[i - 1] not in _BOUNDS for i in places)


_BOUNDS = {"than", "exactly", "least", "most", "above", "below", "over", "under"}
"""A number after one of these words is a bound, such as in "larger than 4", and no answer."""


# ---- benchmarks -------------------------------------------------------------------------------------------------------


class Benchmarks:
    """Images and wordings of benchmarks.

    Args:
        cfg: `benchmarks` names folders of pictures, and files or data sets of rows.
    Raises:
        ValueError: one of them cannot be read.
    """

    def __init__(self, cfg: FilterSettings, pool: Pool):
        self.cfg, self.pool, self.images = cfg, pool, Known()
        self.ngrams: dict[tuple[str, ...], str] = {}
        self._looks: dict[str, Look] = {}
        for path in cfg.benchmarks:
            for data, facts in pictures_of(path, BENCHMARK_SPLITS):
                try:
                    self.images.add(f"{path}: {facts['origin']}", look_of(read_image(data)))
                except ValueError as error:
                    raise ValueError(f"{facts['origin']} of the benchmark {path} cannot be compared: {error}.") from None
            for text in _questions_of(path):
                for ngram in _ngrams(text, cfg.ngram):
                    self.ngrams.setdefault(ngram, f"{path}: {text[:80]}")

    def has(self, question: Question) -> str:
        """Return what of the question is of a benchmark, in words; "" for nothing."""
        for number, picture in enumerate(question.images, 1):
            if self.images.names:
                look = self._looks.get(picture) or self._looks.setdefault(picture, look_of(self.pool.image(picture)))
                if (name := self.images.find(look)) is not None:
                    return f"Image {number} is {name}"
        shared = (self.ngrams[ngram] for ngram in _ngrams(question.text, self.cfg.ngram) if ngram in self.ngrams)
        return next((f"the wording is that of {where}" for where in shared), "")


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Yield n words in a row; of a shorter text, all its words."""
    words = normalise(text).split()
    yield from (tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)) if words)


def _questions_of(path: str) -> Iterator[str]:
    from imagent_jax.data.check import RowError
    from imagent_jax.data.files import NoSplit
    from imagent_jax.data.formats import format_of, read_row

    try:
        sources = [] if path.endswith(".tar") else sources_of(path, BENCHMARK_SPLITS)
    except NoSplit:  # pictures without questions
        sources = []
    for source in sources:
        for _, _, row in source.rows():
            if isinstance(row, dict) and (form := format_of(row)):
                try:
                    yield read_row(row, form, "row")[0].question
                except RowError:  # a row without a question or answer can still have images
                    continue


# ---- all questions ----------------------------------------------------------------------------------------------------


def without_duplicates(questions: Sequence[Question], cfg: FilterSettings) -> Iterator[Question]:
    """Yield questions in order, one like an earlier one about the same images as dropped.

    Two are alike if they have the same kind, the same answer and the same places, or nearly the same words. Images are compared
    by what they are, not by their number.
    """
    kept: dict[frozenset[str], list[tuple[Question, set[str]]]] = defaultdict(list)
    for question in questions:
        words, others = _words(question), kept[frozenset(question.images)]
        twin = next((other for other, its in others if _alike(question, words, other, its, cfg.same_text)), None)
        if twin:
            yield dropped(question, "duplicate", f"{twin.uid} is the same: {twin.text}")
        else:
            others.append((question, words))
            yield question


def _alike(a: Question, words: set[str], b: Question, its: set[str], same_text: float) -> bool:
    return len(words & its) / len(words | its) >= same_text or (
        (a.kind, _named(a, a.answer)) == (b.kind, _named(b, b.answer)) and _same_places(a, b)
    )


def _same_places(a: Question, b: Question) -> bool:
    """Return whether each place of a question is one of the other: boxes that overlap by half (IoU)."""

    def has(place: Evidence, image: str, other: Question) -> bool:
        return any(other.images[one.image - 1] == image and _overlap(place, one) >= 0.5 for one in other.evidence)

    both = bool(a.evidence) and len(a.evidence) == len(b.evidence)
    return both and all(has(place, a.images[place.image - 1], b) for place in a.evidence)


def _overlap(a: Evidence, b: Evidence) -> float:
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    common = max(0, width) * max(0, height)
    return common / (_area(a) + _area(b) - common)


def _named(question: Question, text: str) -> str:
    """Return a text with the ids of images in place of their numbers."""
    return re.sub(r"\bImage (\d+)", lambda m: question.images[int(m[1]) - 1] if int(m[1]) <= len(question.images) else m[0], text)


def _words(question: Question) -> set[str]:
    """Return pairs of words in a row, so that their order counts a little."""
    words = ["", *normalise(_named(question, question.text)).split(), ""]
    return {f"{a} {b}" for a, b in zip(words, words[1:], strict=False)}


def balanced(questions: Sequence[Question], cfg: FilterSettings) -> Iterator[Question]:
    """Yield questions in order, those as dropped whose answer has had its share among questions of its kind.

    The share is `balance` times that of an even spread over the answers which occur; kinds of fewer than 20 questions are left.
    """
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        kinds[question.kind][question.answer] += 1
    had: Counter[tuple[str, str]] = Counter()
    for question in questions:
        counts, key = kinds[question.kind], (question.kind, question.answer)
        most = cfg.balance * counts.total() / len(counts)
        had[key] += 1
        if counts.total() >= 20 and len(counts) > 1 and had[key] > most:
            why = f"{counts[question.answer]} of {counts.total()} questions of kind {question.kind} have this answer"
            yield dropped(question, "balance", why)
        else:
            yield question
