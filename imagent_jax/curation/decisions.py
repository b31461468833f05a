"""Decisions of reviewers: an append-only log in SQLite, agreement by Cohen's kappa, and the questions that remain.

Several processes and threads may write at once (WAL). Each entry has an id of its own: one that is sent again counts once.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagent_jax.curation.question import Event, Evidence, Question
from imagent_jax.runs.whole import write_whole

FILE, QUESTIONS = "review.sqlite", "questions.jsonl"
VERDICTS = ("accept", "mend", "reject", "unsure")
BLIND = "answer"
"""Verdict of an entry that is a reviewer's own answer, given before the claim was seen; no decision."""
DONE = {"accept": "accepted", "mend": "mended", "reject": "rejected", "unsure": "unsure"}
FIELDS = ("text", "answer", "options", "evidence")
"""What a reviewer may mend."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, question TEXT NOT NULL, content TEXT NOT NULL, reviewer TEXT NOT NULL,
  adjudicator INTEGER NOT NULL, verdict TEXT NOT NULL, facts TEXT NOT NULL, time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_question ON log (question, reviewer);
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_loss BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""


@dataclass(frozen=True)
class Decision:
    """What a reviewer says of a question.

    Attributes:
        question: uid of the question.
        reviewer: name.
        verdict: one of `VERDICTS`, or `BLIND`.
        facts: `reason` of a rejection, `changes` of a mend (of `FIELDS`), `answer` of a blind answer.
        adjudicator: it settles a disagreement of others.
    """

    question: str
    reviewer: str
    verdict: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    adjudicator: bool = False


def content(question: Question) -> str:
    """Return the hash of what a reviewer judges. Decisions on another content do not count."""
    judged = [question.text, question.images, question.answer, question.options, [(e.image, e.box) for e in question.evidence]]
    return hashlib.sha256(json.dumps(judged).encode()).hexdigest()


def read_questions(folder: Path) -> dict[str, Question]:
    """Return the questions of `questions.jsonl` that no filter dropped, by uid, in order.

    Raises:
        ValueError: there is no such file, or a line is no question.
    """
    path, found = folder / QUESTIONS, {}
    if not path.is_file():
        raise ValueError(f"There is no {path}; name a folder that imagent curate wrote.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                question = Question.from_json(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is no question ({error}); write the file anew.") from None
            if question.uid in found:
                raise ValueError(f"Line {number} of {path} repeats the uid {question.uid!r}; give each question its own.")
            if not question.history or question.history[-1].what != "dropped":
                found[question.uid] = question
    return found


def mend(question: Question, changes: Mapping[str, Any]) -> Question:
    """Return the question with a reviewer's changes, which are JSON values.

    Raises:
        ValueError: they are none, or give no question; one sentence.
    """
    if other := changes.keys() - set(FIELDS):
        raise ValueError(f"{sorted(other)[0]!r} cannot be mended; change one of {', '.join(FIELDS)}")
    values: dict[str, Any] = dict(changes)
    try:
        for name in {"text", "answer"} & values.keys():
            if not isinstance(values[name], str) or not values[name].strip():
                raise ValueError(f"the {name} is empty")
            values[name] = values[name].strip()
        if "options" in values:
            if not all(isinstance(option, str) and option.strip() for option in values["options"]):
                raise ValueError("an option is empty")
            values["options"] = tuple(option.strip() for option in values["options"])
        if "evidence" in values:
            values["evidence"] = tuple(_place(question, n, e) for n, e in enumerate(values["evidence"]))
        made = dataclasses.replace(question, **values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the changes have another form than expected ({error})") from None
    if made.options:
        letters, made = made.letters, dataclasses.replace(made, answer_type="choice")
        if len(made.options) > len(letters) or made.answer not in [*letters]:
            raise ValueError(f"with options, the answer is the letter of one, {letters[0]} to {letters[-1]}, not {made.answer!r}")
        if why := made.options_fault():
            raise ValueError(why)
    elif question.options:
        made = dataclasses.replace(made, answer_type=question.open_type)
    if not made.right(made.answer):
        raise ValueError(f"the answer {made.answer!r} does not score against itself")
    if made == question:
        raise ValueError("nothing is changed; accept the question, or change something")
    return made


def _place(question: Question, index: int, change: Mapping[str, Any]) -> Evidence:
    """A mended place. What the one before it asks and shows stays, if it is of the same image."""
    number, box = change["image"], _box(change["box"])
    for place in question.evidence[index : index + 1]:
        if place.image == number:
            return dataclasses.replace(place, box=box)
    return Evidence(number, box)


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa of two reviewers' labels of the same questions; None where it is undefined (no or one label).

    Source: J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    count, ours, theirs = len(first), Counter(first), Counter(second)
    chance = sum(ours[label] * theirs[label] for label in ours)
    if chance == count**2:
        return None
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    return (count * agreed - chance) / (count**2 - chance)


@dataclass(frozen=True)
class Settled:
    """What the decisions on a question come to.

    Attributes:
        state: "open" (too few decisions), "disagreed", "kept" or "rejected".
        question: as it is kept, its history without the review.
    """

    state: str
    question: Question | None = None


def settle(question: Question, decisions: Iterable[Decision], reviewers: int = 2) -> Settled:
    """Return what decisions come to, one of each person. An adjudicator's counts alone; of others, all have to agree.

    Args:
        reviewers: fewest decisions that suffice without an adjudicator.
    """
    found = list(decisions)
    final = [d for d in found if d.adjudicator]
    said = final[-1:] or found
    if not final and len(said) < reviewers:
        return Settled("open")
    results = []
    for decision in said:
        if decision.verdict == "unsure":
            return Settled("disagreed")
        kept = mend(question, decision.facts["changes"]) if decision.verdict == "mend" else question
        results.append(Settled("rejected") if decision.verdict == "reject" else Settled("kept", kept))
    return results[0] if all(result == results[0] for result in results) else Settled("disagreed")


def _box(numbers: Sequence[Any]) -> tuple[int, int, int, int]:
    if len(numbers) != 4:
        raise ValueError(f"a box is left, top, right and bottom, not {list(numbers)}")
    left, top, right, bottom = numbers
    return left, top, right, bottom


class Decisions:
    """The questions of a folder and what was decided on them in `review.sqlite`. May be used from many threads.

    Attributes:
        questions: by uid, in order.
        latest: the latest decision of each person on each question, by uid and name.
        blind: the first blind answer of each person to each question, by uid and name.
        contents: hash of what is judged of each question (`content`), by uid.

    Raises:
        ValueError: see `read_questions`, or the file of decisions is none.
    """

    def __init__(self, folder: Path):
        self.questions, self.path, self._lock = read_questions(folder), folder / FILE, threading.RLock()
        self.latest: dict[str, dict[str, Decision]] = {}
        self.blind: dict[str, dict[str, str]] = {}
        self.contents, self._seen = {uid: content(question) for uid, question in self.questions.items()}, 0
        try:
            self._base = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} cannot be opened ({error}); move it away, or make the folder writable.") from None
        self.refresh()

    def add(self, id: str, decision: Decision) -> None:
        """Append a decision; returns when it is on disk. One whose id is in the log already is not added again.

        Raises:
            ValueError: there is no such question or verdict, or its changes give no question.
        """
        question = self.questions.get(decision.question)
        if question is None:
            raise ValueError(f"there is no question {decision.question!r}")
        if decision.verdict not in (*VERDICTS, BLIND):
            raise ValueError(f"the verdict {decision.verdict!r} does not exist; use one of {', '.join(VERDICTS)}")
        if decision.verdict == "mend":
            mend(question, decision.facts.get("changes", {}))
        if decision.verdict == "reject" and not str(decision.facts.get("reason", "")).strip():
            raise ValueError("a rejection has a reason; give one")
        row = (id, question.uid, self.contents[question.uid], decision.reviewer, decision.adjudicator, decision.verdict)
        names = "id, question, content, reviewer, adjudicator, verdict, facts, time"
        with self._lock:
            self._base.execute(
                f"INSERT OR IGNORE INTO log ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, json.dumps(dict(decision.facts), ensure_ascii=False), time.time()),
            )
        self.refresh()

    def refresh(self) -> None:
        """Read what was added since, by this process or another. Decisions on another content of a question do not count."""
        columns = "number, content, question, reviewer, verdict, facts, adjudicator"
        with self._lock:
            for number, hashed, uid, name, verdict, facts, adjudicator in self._base.execute(
                f"SELECT {columns} FROM log WHERE number > ? ORDER BY number", (self._seen,)
            ):
                self._seen = number
                if self.contents.get(uid) != hashed:
                    continue
                decision = Decision(uid, name, verdict, json.loads(facts), bool(adjudicator))
                if verdict == BLIND:
                    self.blind.setdefault(uid, {}).setdefault(name, decision.facts["answer"])
                else:
                    decided = self.latest.setdefault(uid, {})
                    decided.pop(name, None)  # the latest stands last
                    decided[name] = decision

    def of(self, uid: str) -> list[Decision]:
        """Return the latest decision of each person on a question, in the order made."""
        with self._lock:
            return list(self.latest.get(uid, {}).values())

    def settled(self, uid: str, reviewers: int = 2) -> Settled:
        """Return what the decisions on a question come to; see `settle`."""
        return settle(self.questions[uid], self.of(uid), reviewers)

    def disputed(self) -> list[str]:
        """Return the questions for an adjudicator: those on which reviewers disagree, settled since or not."""
        return [
            uid
            for uid in self.questions
            if settle(self.questions[uid], [d for d in self.of(uid) if not d.adjudicator]).state == "disagreed"
        ]

    def agreement(self) -> list[dict[str, Any]]:
        """Return for each pair of reviewers how many questions both decided, how many alike, and Cohen's kappa."""
        verdicts = [{d.reviewer: d.verdict for d in self.of(uid) if not d.adjudicator} for uid in self.questions]
        found = []
        for pair in itertools.combinations(sorted({name for each in verdicts for name in each}), 2):
            both = [tuple(each[name] for name in pair) for each in verdicts if all(name in each for name in pair)]
            first, second = [a for a, _ in both], [b for _, b in both]
            alike = sum(a == b for a, b in both)
            found.append({"reviewers": list(pair), "questions": len(both), "alike": alike, "kappa": kappa(first, second)})
        return found

    def progress(self) -> dict[str, int]:
        """Return how many questions each person has decided, by name."""
        return dict(sorted(Counter(d.reviewer for uid in self.questions for d in self.of(uid)).items()))

    def close(self) -> None:
        """Close the file; its log is joined with it."""
        with self._lock:
            self._base.close()


def open_decisions(folder: Path) -> Decisions:
    """Return the decisions of a folder.

    Raises:
        ValueError: nobody has reviewed it yet; see `Decisions`.
    """
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} has no {FILE}: nobody has reviewed it yet; run imagent curate --review {folder}.")
    return Decisions(folder)


def reviewed(folder: Path, reviewers: int = 2) -> Iterator[Question]:
    """Iterate over the questions that people kept, mended where they mended them; each decision is an event of its history.

    Questions that were rejected, on which reviewers disagree, or that too few have seen are left out.

    Args:
        reviewers: fewest decisions that suffice without an adjudicator.
    Raises:
        ValueError: see `open_decisions`.
    """
    with contextlib.closing(open_decisions(folder)) as decisions:
        for uid in decisions.questions:
            if (kept := decisions.settled(uid, reviewers).question) is None:
                continue
            for decision in decisions.of(uid):
                own = {"answer": blind} if (blind := decisions.blind.get(uid, {}).get(decision.reviewer)) is not None else {}
                settles = {"adjudicator": True} if decision.adjudicator else {}
                facts = {**decision.facts, **own, **settles}
                kept = kept.after(Event(f"review:{decision.reviewer}", DONE[decision.verdict], facts))
            yield kept


def export(folder: Path, reviewers: int = 2) -> Path:
    """Write the latest decision of each person on each question to `decisions.jsonl`, whole or not at all; return its path.

    Raises:
        ValueError: see `open_decisions`.
    """
    path, lines = folder / "decisions.jsonl", []
    with contextlib.closing(open_decisions(folder)) as decisions:
        for uid in decisions.questions:
            for decision in decisions.of(uid):
                more = {
                    "blind": decisions.blind.get(uid, {}).get(decision.reviewer),
                    "state": decisions.settled(uid, reviewers).state,
                }
                lines.append(json.dumps(dataclasses.asdict(decision) | more, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))
    return path
