"""The pipeline of curation: pool, groups, questions made by agents, filters over all, the funnel. A stopped run goes on.

The folder of a run:

    settings.json    what the questions depend on
    pool/, pool.jsonl    the pictures
    work.jsonl    what became of each proposal, in the order in which they ended
    questions.jsonl    all questions with their history, in order, kept and dropped
    funnel.json    how many each filter dropped, with an example
    release/    the data set
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from imagent_jax.curation.agents import AgentError, Backend
from imagent_jax.curation.difficulty import RateFile, measured
from imagent_jax.curation.filters import FILTERS, Benchmarks, Checks, balanced, without_duplicates
from imagent_jax.curation.groups import make_groups
from imagent_jax.curation.making import Made, Maker
from imagent_jax.curation.pool import Pool, build_pool
from imagent_jax.curation.question import Question
from imagent_jax.curation.roles import Roles, load_backends, load_prompts
from imagent_jax.curation.settings import Curation
from imagent_jax.runs.whole import Lines, write_whole

Progress = Callable[[str], None]
_LATER = {
    ("run", "out"),
    ("run", "proposals"),
    ("run", "parallel"),
    ("run", "failures"),
    ("filters", "same_text"),
    ("filters", "balance"),
}
"""Settings that may differ when a run goes on: what was made does not depend on them."""


class Stopped(Exception):
    """The run was asked to stop. What is done is on disk."""


class Work:
    """What became of proposals, on disk: a line for each, whole once it is written.

    Raises:
        ValueError: a line is damaged.
    """

    def __init__(self, path: Path):
        self.lines, self.made = Lines(path), {}
        for number, values in enumerate(self.lines.values, 1):
            try:
                question = values["question"] and Question.from_json(json.dumps(values["question"]))
                self.made[values["number"]] = Made(values["number"], question, values["why"], values["proposal"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); delete the line, and start again.") from None

    def add(self, made: Made) -> None:
        """Write a line."""
        self.made[made.number] = made
        question = json.loads(made.question.to_json()) if made.question else None
        self.lines.add({"number": made.number, "question": question, "why": made.why, "proposal": made.proposal})


def check_settings(cfg: Curation, out: Path) -> None:
    """Write what the questions of a run depend on, or compare it with what stands there.

    Raises:
        ValueError: the run was begun with other settings.
    """
    ours = {
        section: {name: value for name, value in values.items() if (section, name) not in _LATER}
        for section, values in cfg.to_dict().items()
        if section not in ("difficulty", "release")
    }
    path = out / "settings.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        for section, values in ours.items():
            for name, value in values.items():
                if (old := theirs.get(section, {}).get(name)) != value:
                    raise ValueError(
                        f"{out} was begun with {section}.{name} {old!r}, not {value!r}; set it back, or name another run.out."
                    )
    write_whole(path, json.dumps(ours, indent=2))


def curate(
    cfg: Curation,
    backends: Mapping[str, Backend] | None = None,
    progress: Progress = lambda words: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make questions, filter them, and write `questions.jsonl` and `funnel.json`; return the funnel.

    Args:
        backends: by role, in place of those of the settings.
        asked_to_stop: is asked after each question.
    Raises:
        ValueError: a source, setting or backend cannot be used.
        Stopped: the run was asked to stop.
        AgentError: `run.failures` proposals in a row had no answer of an agent.
    """
    out = Path(cfg.run.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    check_settings(cfg, out)
    pool = build_pool(cfg.pool, cfg.run.seed, out, progress)
    groups = make_groups(cfg.groups, pool, cfg.run.seed)
    progress(f"{len(pool.pictures)} pictures, {len(groups)} groups")
    roles = Roles(backends or load_backends(cfg.agents), load_prompts(cfg.agents.prompts), pool, cfg.filters)
    checks = Checks(roles, cfg.agents, cfg.filters, Benchmarks(cfg.filters, pool))
    work = Work(out / "work.jsonl")
    failed = _make_all(Maker(roles, checks, groups, cfg.agents, cfg.run.seed), work, cfg, progress, asked_to_stop)
    made = [work.made[number] for number in sorted(work.made) if number < cfg.run.proposals]
    questions = filter_all([one.question for one in made if one.question], pool, cfg, out, progress)
    write_whole(out / "questions.jsonl", "".join(question.to_json() + "\n" for question in questions))
    funnel = funnel_of(questions, [one for one in made if not one.question], failed)
    write_whole(out / "funnel.json", json.dumps(funnel, indent=2, ensure_ascii=False))
    return funnel


def _make_all(maker: Maker, work: Work, cfg: Curation, progress: Progress, asked_to_stop: Callable[[], bool]) -> dict[int, str]:
    """Make the questions that are not made yet; return why some have no end, by number."""
    left = iter([number for number in range(cfg.run.proposals) if number not in work.made])
    failed: dict[int, str] = {}
    row, pool = 0, ThreadPoolExecutor(cfg.run.parallel, "questions")
    waiting: dict[Future[Made], int] = {}
    try:
        while True:
            stop = asked_to_stop()
            while not stop and len(waiting) < cfg.run.parallel and (number := next(left, None)) is not None:
                waiting[pool.submit(maker.make, number)] = number
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                number = waiting.pop(future)
                try:
                    work.add(future.result())
                    row = 0
                except AgentError as error:
                    failed[number], row = str(error), row + 1
                done = len(work.made)
                if done % max(1, cfg.run.proposals // 20) == 0:
                    progress(f"{done} of {cfg.run.proposals} proposals done, {_kept(work)} questions kept so far")
            if row >= cfg.run.failures:
                raise AgentError(f"{row} proposals in a row had no answer of an agent. The last: {[*failed.values()][-1]}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if asked_to_stop():
        raise Stopped(f"{len(work.made)} of {cfg.run.proposals} proposals are done; the same command goes on.")
    return failed


def _kept(work: Work) -> int:
    return sum(one.question is not None and is_kept(one.question) for one in list(work.made.values()))


def is_kept(question: Question) -> bool:
    """Return whether no filter has dropped a question."""
    return question.history[-1].what != "dropped"


def filter_all(questions: Sequence[Question], pool: Pool, cfg: Curation, out: Path, progress: Progress) -> list[Question]:
    """Return all questions, those as dropped that the filters over all questions drop."""
    steps: list[Callable[[Sequence[Question]], Iterator[Question]]] = [
        lambda some: without_duplicates(some, cfg.filters),
        lambda some: balanced(some, cfg.filters),
    ]
    if cfg.difficulty.on:
        steps.append(lambda some: measured(some, pool, cfg.difficulty, RateFile(out / "difficulty.jsonl"), progress))
    ended = {question.uid: question for question in questions}
    for step in steps:
        for question in step([one for one in ended.values() if is_kept(one)]):
            ended[question.uid] = question
    return [*ended.values()]


def funnel_of(questions: Sequence[Question], bad: Sequence[Made], failed: Mapping[int, str]) -> dict[str, Any]:
    """Return how many questions were proposed, found faulty and dropped by each filter, with an example, and kept."""
    filters: dict[str, dict[str, Any]] = {}
    for name, what in FILTERS.items():
        found = [q for q in questions if any(e.by == f"filter:{name}" and e.what in ("found", "dropped") for e in q.history)]
        out = [q for q in questions if q.history[-1].by == f"filter:{name}"]
        filters[name] = {"drops where": what, "found": len(found), "dropped": len(out)}
        if out:
            first = out[0]
            why = first.history[-1].facts["why"]
            filters[name]["example"] = {"uid": first.uid, "question": first.text, "answer": first.answer, "why": why}
        if name == "schema" and bad:
            example = {"uid": f"q{bad[0].number:06d}", "proposal": bad[0].proposal, "why": bad[0].why}
            filters[name] |= {"found": len(bad), "dropped": len(bad), "example": example}
    kept = [question for question in questions if is_kept(question)]
    return {
        "proposed": len(questions) + len(bad),
        "without an answer of an agent": len(failed),
        "filters": filters,
        "kept": len(kept),
        "kept after repair": sum(any(e.what == "repaired" for e in q.history) for q in kept),
        "kinds": dict(sorted(Counter(question.kind for question in kept).items())),
    }
