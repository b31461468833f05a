"""What controls say: a line of figures and a sentence for each, from the normal evaluation and those under the control."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from imagent_jax.evals.controls import CONTROLS, Variant, variants
from imagent_jax.rl.guards import looks_unused
from imagent_jax.types import CallStatus, Trajectory

Run = Callable[[Variant], Sequence[Trajectory]]
"""Evaluates the tasks of a variant in its environment."""


class Line(NamedTuple):
    """Tasks without and under a variant of a control.

    Attributes:
        tasks: tasks compared: those without an environment error in either evaluation, and with `one_observation` those that are
            the same up to the exchanged observation.
        right, under: how many are right in the normal evaluation and under the control.
        won, lost: how many are right only in the normal evaluation, and only under the control.
        changed: how many have another answer.
    """

    control: str
    label: str
    tasks: int
    right: int
    under: int
    won: int
    lost: int
    changed: int

    @property
    def drops(self) -> bool:
        """Whether accuracy drops by more than two standard deviations of a fair coin (sign test)."""
        return self.won - self.lost > 2 * math.sqrt(self.won + self.lost)

    @property
    def acted_on(self) -> bool:
        """Whether more than one answer in fifty is another; rounding of sums may change a few."""
        return self.changed > self.tasks / 50

    @property
    def rises(self) -> bool:
        return self.lost - self.won > 2 * math.sqrt(self.won + self.lost)


def audit(controls: Sequence[str], done: Sequence[Trajectory], seed: int, run: Run) -> tuple[list[Line], dict[str, str]]:
    """Return the lines and the sentence of each control.

    Args:
        done: trajectories of the normal evaluation.
        run: evaluates a variant, by the same seed as `done`.
    """
    lines: list[Line] = []
    for control in controls:
        for variant in variants(control, done, seed):
            under = run(variant) if len(variant.places) else []
            lines.append(compared(variant, [done[i] for i in variant.places], under))
    return lines, {control: sentence(control, [line for line in lines if line.control == control]) for control in controls}


def compared(variant: Variant, true: Sequence[Trajectory], under: Sequence[Trajectory]) -> Line:
    """Return the line of a variant."""
    pairs = [(a, b) for a, b in zip(true, under, strict=True) if a.error is None and b.error is None]
    if variant.call:
        pairs = [(a, b) for a, b in pairs if _same_until(a, b, variant.call)]
    right = np.asarray([[a.right, b.right] for a, b in pairs], bool).reshape(-1, 2)
    changed = sum((a.answer or "") != (b.answer or "") for a, b in pairs)
    won, lost = int(np.sum(right[:, 0] & ~right[:, 1])), int(np.sum(right[:, 1] & ~right[:, 0]))
    return Line(variant.control, variant.label, len(pairs), int(right[:, 0].sum()), int(right[:, 1].sum()), won, lost, changed)


def _same_until(a: Trajectory, b: Trajectory, call: int) -> bool:
    """Return whether two trajectories made this executed call, after the same tokens."""
    ends = []
    for t in (a, b):
        executed = [turn.stop for turn in t.turns if turn.call and turn.call.status == CallStatus.EXECUTED]
        if len(executed) < call:
            return False
        ends.append(executed[call - 1])
    return ends[0] == ends[1] and np.array_equal(a.ids[: ends[0]], b.ids[: ends[1]])


def is_warning(control: str, lines: Sequence[Line]) -> bool:
    """Return whether a control shows what an agent should not be: one that ignores what it sees, or is hurt by its calls."""
    lines = [line for line in lines if line.tasks]
    if control in ("shuffle", "blank"):
        return any(not line.drops for line in lines)
    if control == "one_observation":
        return bool(lines) and not any(line.acted_on for line in lines)
    if control == "no_tools":
        return any(line.rises for line in lines)
    return control == "without_image" and len(lines) > 1 and sum(line.drops for line in lines) < 2


def _share(count: int, of: int) -> str:
    return f"{100 * count / max(of, 1):.0f} %"


def sentence(control: str, lines: Sequence[Line]) -> str:
    """Return one sentence about a control: what its figures show, and no more."""
    lines = [line for line in lines if line.tasks]
    return SENTENCES[control](lines) if lines else "No task could be compared."


def _effect(line: Line, drops: str, rises: str, neither: str) -> str:
    return drops if line.drops else rises if line.rises else neither


def _calls(lines: Sequence[Line]) -> str:
    [line] = lines
    wrong, right = line.tasks - line.under, line.under
    effect = _effect(line, "Calls help", "Calls hurt", "Calls neither help nor hurt as far as these tasks show")
    return (
        f"{effect}: of {wrong} tasks wrong without tools, {_share(line.won, wrong)} are right with them (Call Gain); "
        f"of {right} right without, {_share(line.lost, right)} are wrong with them (Call Harm)."
    )


def _observations(lines: Sequence[Line]) -> str:
    said = ", ".join(f"{_share(line.changed, line.tasks)} of {line.tasks} after {line.label}" for line in lines)
    used = " and ".join(line.label for line in lines if line.acted_on)
    verdict = f"The agent acts on what {used} showed" if used else "The agent ignores what its calls show"
    return f"{verdict}: answers that change where one observation is exchanged: {said}."


def _order(lines: Sequence[Line]) -> str:
    [line] = lines
    effect = _effect(line, "Accuracy drops", "Accuracy rises", "No effect of order is shown")
    given, other = _share(line.right, line.tasks), _share(line.under, line.tasks)
    return f"{effect}: {given} of {line.tasks} tasks are right in the given order, {other} in another."


def _images(lines: Sequence[Line]) -> str:
    needed = [line.label for line in lines if line.drops]
    verdict = f"Only {' and '.join(needed)} {'is' if len(needed) == 1 else 'are'} needed"
    if len(needed) in (0, len(lines)):
        verdict = "Every image is needed by some tasks" if needed else "No single image is needed as far as these tasks show"
    figures = [(_share(line.under, line.tasks), line.label, _share(line.right, line.tasks)) for line in lines]
    return f"{verdict}: {', '.join(f'{under} without {label} ({right} with)' for under, label, right in figures)}."


def _accuracy(lines: Sequence[Line]) -> str:
    [line] = lines
    words, right = CONTROLS[line.control], line.right
    if line.drops:
        return f"Accuracy drops from {_share(right, line.tasks)} to {_share(line.under, line.tasks)} with {words}."
    true = np.arange(line.tasks) < right  # only the counts matter to the sentence
    under = np.concatenate([np.arange(right) >= line.won, np.arange(line.tasks - right) < line.lost])
    return looks_unused(true, under, words) or ""


SENTENCES: dict[str, Callable[[Sequence[Line]], str]] = {
    "shuffle": _accuracy, "blank": _accuracy, "no_tools": _calls, "one_observation": _observations, "permute": _order,
    "without_image": _images,
}  # fmt: skip
"""What is said of the lines of a control."""


def table(lines: Sequence[Line], title: str) -> Table:
    """Return the table of all controls."""
    made = Table(title=title)
    figures = ("without control", "under control", "right only without", "right only under", "answers changed")
    for column in ("control", "", "tasks", *figures):
        made.add_column(column, justify="left" if column in ("control", "") else "right")
    for line in lines:
        shares = (_share(line.right, line.tasks), _share(line.under, line.tasks))
        rest = (str(line.won), str(line.lost), _share(line.changed, line.tasks))
        made.add_row(line.control, line.label, str(line.tasks), *shares, *rest)
    return made
