"""One question from its proposal to its end: proposed, checked, repaired, checked again, kept or dropped."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imagent_jax.curation.filters import UNMENDABLE, Checks, dropped
from imagent_jax.curation.groups import Group
from imagent_jax.curation.question import Event, Evidence, Question
from imagent_jax.curation.roles import ANSWER_TYPES, Roles
from imagent_jax.curation.settings import AgentSettings


class BadProposal(Exception):
    """A proposal that is no question. The message says why."""


@dataclass(frozen=True)
class Made:
    """What became of a proposal.

    Attributes:
        number: of the proposal.
        question: with its whole history; None: the proposal was no question.
        why: why it was none.
        proposal: what was proposed, where it was none.
    """

    number: int
    question: Question | None
    why: str = ""
    proposal: Mapping[str, Any] | None = None


class Maker:
    """Makes questions.

    Args:
        groups: image groups; proposal n is about group n modulo their number.
    """

    def __init__(self, roles: Roles, checks: Checks, groups: Sequence[Group], cfg: AgentSettings, seed: int):
        self.roles, self.checks, self.groups, self.cfg, self.seed = roles, checks, groups, cfg, seed

    def make(self, number: int) -> Made:
        """Return what becomes of a proposal: a function of its number, the groups, and what the agents say.

        Raises:
            AgentError: an agent gave no answer; nothing is decided about the question.
        """
        earlier, place = divmod(number, len(self.groups))
        group = self.groups[place]
        proposal = self.roles.propose(number + self.seed * 1_000_003, group.images, earlier)
        try:
            question = question_of(proposal, f"q{number:06d}", group.images, group.name)
        except BadProposal as error:
            return Made(number, None, str(error), proposal)
        question = self._with_options(question.after(Event("proposer", "proposed", {"way": group.way, **proposal})))
        for rounds in range(self.cfg.repairs + 1):
            question, found = self.checks.find(question)
            if not found:
                return Made(number, question.after(Event("pipeline", "kept")))
            if rounds == self.cfg.repairs or {name for name, _ in found} & UNMENDABLE:
                break
            question, mended = self._repaired(question, [why for _, why in found])
            if not mended:
                break
        name, why = found[0]
        return Made(number, dropped(question, name, why))

    def _repaired(self, question: Question, findings: Sequence[str]) -> tuple[Question, bool]:
        """Return the question as the repairer rewrites it, and whether it could."""
        open_one = replace(question, options=(), answer=_plain_answer(question), answer_type=question.open_type)
        rewritten = self.roles.repair(open_one, findings)
        try:
            new = question_of(rewritten, question.uid, question.images, question.group)
        except BadProposal as error:
            return question.after(Event("repairer", "failed", {"why": str(error)})), False
        event = Event("repairer", "repaired", {"because": [*findings], **rewritten})
        return self._with_options(replace(new, history=(*question.history, event))), True

    def _with_options(self, question: Question) -> Question:
        """Return the question with options, where the settings want some; they stand in an order that its uid decides."""
        if not self.cfg.options:
            return question
        wrong = self.roles.distract(question, self.cfg.options - 1)
        options = sorted(
            [question.answer, *wrong], key=lambda text: hashlib.sha256(f"{self.seed} {question.uid} {text}".encode()).digest()
        )
        letter = string.ascii_uppercase[options.index(question.answer)]
        event = Event("distractors", "offered", {"options": options, "answer": question.answer, "type": question.answer_type})
        return question.after(event, options=tuple(options), answer=letter, answer_type="choice")


def _plain_answer(question: Question) -> str:
    """Return the answer as text: of a question with options, that of its letter."""
    return question.options[question.letters.index(question.answer)] if question.options else question.answer


def question_of(proposal: Mapping[str, Any], uid: str, images: Sequence[str], group: str) -> Question:
    """Return the question of a proposal.

    Raises:
        BadProposal: it is none: a text or place is missing, a box is empty or outside, or the answer is not of its type.
    """
    try:
        if not proposal["question"].strip() or not proposal["answer"].strip():
            raise BadProposal("the question or its answer is empty")
        places = tuple(Evidence(e["image"], tuple(e["box"]), e["asks"].strip(), e["shows"].strip()) for e in proposal["evidence"])
        if not places:
            raise BadProposal("it rests on no place of an image")
        if any(not place.asks or not place.shows for place in places):
            raise BadProposal("a place says not what it shows")
        if proposal["answer_type"] not in ANSWER_TYPES:
            raise BadProposal(f"the answer type {proposal['answer_type']!r} does not exist")
        question = Question(
            uid,
            proposal["question"].strip(),
            tuple(images),
            proposal["answer"].strip(),
            proposal["kind"],
            places,
            proposal["several"] is True,
            (),
            group,
            proposal["answer_type"],
        )
        if not question.right(question.answer):
            raise BadProposal(f"the answer {question.answer!r} does not score against itself")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadProposal(f"{error}" if isinstance(error, ValueError) else f"it lacks a part ({error!r})") from None
    return question
