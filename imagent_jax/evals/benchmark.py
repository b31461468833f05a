"""What a benchmark is: where its files are, how rows become tasks, what the policy is shown, and how replies are scored."""

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imagent_jax.config import DataConfig
from imagent_jax.data.check import Progress, TaskCheck, Tasks
from imagent_jax.data.files import CONTAINERS, HubSplit, Source, open_file
from imagent_jax.data.formats import Fields, Format, Row
from imagent_jax.data.reader import FileTasks, read_tasks
from imagent_jax.evals.rules import Metric
from imagent_jax.types import Task

QUESTION = "{question}"
"""Where a prompt template shows the question; without it, the images stand before the text of the template."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: short name for commands and results.
        title: its name, with the number of rows where it is known.
        needs: columns of its rows ("a|b": one of them).
        read: takes the fields out of a row, see `data.formats`; the other columns are the task's `meta`.
        metrics: what is measured, by name; "" is the name of a benchmark's only metric.
        template: the benchmark's own prompt of a task, with `QUESTION` in it.
        hub: id of its data set on the Hugging Face hub; "": files only.
        split, configs: of the data set there.
        answer_type: of rows without options; "": guessed from the answers.
        lettered: see `formats.Format`.
        groups: groups of a task by name of the grouping.
        question: key of the question that a row asks; several rows may ask the same one with its options in another order.
        circular: a question is right only if all of its rows are.
        headline: the average that is published: "micro" (over rows), or the grouping whose groups count equally ("macro").
        within: of a grouping, the grouping over whose groups its own are means.
        shuffle: options are shown in an order by seed, as they stand in an order that gives the answer away.
        fixed: the benchmark's own prompt holds the options as its rows have them, so they cannot be shuffled under it.
        judged: the published score needs a language model as a judge.
        loop: name of the loop in which it was published (`evals.published.FORMS`); "": it is one reply.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    read: Callable[[Row], Fields]
    metrics: dict[str, Metric]
    template: Callable[[Task], str]
    hub: str = ""
    split: str = "test"
    configs: tuple[str, ...] = ()
    answer_type: str = ""
    lettered: bool = True
    groups: Callable[[Task], dict[str, str]] = lambda task: {"task": task.kind} if task.kind else {}
    question: Callable[[Task], str] = lambda task: task.uid
    circular: bool = False
    headline: str = "micro"
    within: Mapping[str, str] = field(default_factory=dict)
    shuffle: bool = False
    fixed: bool = False
    judged: bool = False
    loop: str = ""

    def sources(self, path: str = "") -> list[Source]:
        """Return the files at a path (a file, a folder, a pattern), or the data set on the hub without one.

        Raises:
            ValueError: there are no such files.
        """
        if not path:
            if not self.hub:
                raise ValueError(f"The benchmark {self.name} has no data set of its own; name its files as {self.name}=PATH.")
            return [HubSplit(self.hub, self.split, config) for config in self.configs or ("",)]
        path = os.path.expanduser(path)
        if not os.path.isdir(path):
            return [open_file(name) for name in sorted(glob.glob(path)) or [path]]
        found = sorted(file for file in Path(path).rglob("*") if file.suffix in CONTAINERS and file.is_file())
        named = [file for file in found if file.name.startswith((f"{self.split}.", f"{self.split}-"))]
        if not (found := named or found):
            raise ValueError(f"{path} has no files of {self.name}; put its {', '.join(CONTAINERS)} files there.")
        if len(kinds := {file.suffix for file in found}) > 1:
            raise ValueError(f"{path} has {' and '.join(sorted(kinds))} files; name one file or a pattern of {self.name}.")
        return [open_file(file) for file in found]

    def open(
        self,
        path: str,
        data: DataConfig,
        *,
        shuffle: bool | None = None,
        check: TaskCheck | None = None,
        progress: Progress = lambda sentence: None,
    ) -> "Questions":
        """Read and check the tasks; see `data.reader.read_tasks`.

        Args:
            data: seed of the order of options, and whether rows with faults are left out.
            shuffle: show options in another order; None: as the benchmark needs it.
        """
        shuffled, sources = self.shuffle if shuffle is None else shuffle, self.sources(path)
        tasks = read_tasks(
            sources,
            skip_bad=data.skip_bad,
            check=check,
            shuffle=data.seed if shuffled else None,
            answer_type=self.answer_type,
            memory=Path(data.cache_dir).expanduser() / "checked",
            progress=progress,
            form=Format(self.name, self.needs, self.read, self.lettered),
        )
        facts = [tasks.row(i).task for i in range(len(tasks))]
        if not self.circular:
            return Questions(tasks, facts, [(i, 0) for i in range(len(tasks))])
        firsts: dict[str, int] = {}  # rows of a question stand together, so that a limit leaves none in part
        for i, task in enumerate(facts):
            firsts.setdefault(self.question(task), i)
        rotations = [1 if len(firsts) < len(tasks) else max(1, len(task.options)) for task in facts]
        order = sorted(range(len(tasks)), key=lambda i: firsts[self.question(facts[i])])
        return Questions(tasks, facts, [(i, k) for i in order for k in range(rotations[i])])

    def prompted(self, task: Task) -> Task:
        """Return the task as it is shown under the benchmark's own prompt. Options stand in the text of that."""
        before, mark, after = self.template(task).partition(QUESTION)
        numbers = [*range(1, len(task.images) + 1)]
        if not mark:
            parts = [*numbers, before]
        elif task.parts:
            parts = [before, *task.parts, after]
        else:
            parts = [*numbers, f"{before}{task.question}{after}"]
        parts = tuple(part.strip("\n") if isinstance(part, str) else part for part in parts)
        question = "\n".join(part for part in parts if isinstance(part, str) and part)
        return replace(task, question=question, parts=tuple(part for part in parts if part), options=())


class Questions(Tasks):
    """The tasks of a benchmark. Images are read when a task is accessed; `facts` has the tasks without them.

    Args:
        facts: the tasks without images.
        places: of each question, its place in `tasks`, and by how many places its options are rotated.
    """

    def __init__(self, tasks: FileTasks, facts: Sequence[Task], places: Sequence[tuple[int, int]]):
        self.tasks, self.places, self.faults = tasks, places, tasks.faults
        self.facts = [rotated(facts[i], k) for i, k in places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i, k = self.places[index]
        return rotated(self.tasks[i], k)


def rotated(task: Task, by: int) -> Task:
    """Return a task whose options are rotated by some places. VLMEvalKit numbers such rows by a million."""
    if not by:
        return task
    count = len(task.options)
    options = tuple(task.options[(i + by) % count] for i in range(count))
    answer, *others = (task.letters[(task.letters.index(letter) - by) % count] for letter in task.answers)
    uid = str(int(task.uid) + 1_000_000 * by) if task.uid.isdigit() else f"{task.uid}+{by}"
    return replace(task, uid=uid, options=options, answer=answer, other_answers=tuple(others))


def option_lines(task: Task, form: str = "{letter}. {option}") -> str:
    """Return the options of a task on lines of their own."""
    return "\n".join(form.format(letter=a, option=b) for a, b in zip(task.letters, task.options, strict=True))


def with_letter(instruction: str, form: str = "{letter}. {option}") -> Callable[[Task], str]:
    """Return the template: question, options on lines, and an instruction where there are options."""

    def template(task: Task) -> str:
        return f"{QUESTION}\n{option_lines(task, form)}\n{instruction}" if task.options else QUESTION

    return template


def images_of(row: Row, *columns: str) -> list:
    """Take the images of numbered columns or of a list out of a row."""
    found = [row.pop(name, None) for name in columns]
    return [image for value in found if value is not None for image in (value if isinstance(value, list) else [value])]
