"""The loop in which Visual-ARFT (arXiv 2505.14246) evaluates: one user message that grows, and at most five replies.

The message holds the latest picture and all text so far: the prompt, the question, and every reply with what came of it. There
are no chat turns and no tool schemas. A reply holds one step: what is wrong with the picture, a program, a query, or the answer.
Programs run in the sandbox, on the dialogue's own pictures, and queries go to the run's search. Forms, number of replies and
what a step leads to are those of Liuziyu77/Visual-RFT, commit 94866331. Its texts are not repeated here: `published_texts.yaml`
holds texts of our own, and `eval.published_texts` names a file of others.
"""

import io
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from imagent_jax.chat import QWEN, Call, QwenChat
from imagent_jax.chat.prompts import Prompt
from imagent_jax.config import Config
from imagent_jax.config.loading import read_file
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import ToolSet, tools_by_name
from imagent_jax.types import CallStatus, EndReason, Task, Trajectory

REPLIES = 5
PASSAGES = 4
SYSTEM = "You are a helpful assistant."
"""What Qwen's template says where a conversation has no system turn."""
INPUT, OUTPUT = "path_to_input_image.jpg", "path_to_output_image.jpg"
TEXTS = {"coding": ("prompt", "crop", "none", "other"), "search": ("prompt",)}
"""Names of the texts, by loop. In `other`, {problems} is what is wrong."""


class UnlabelledChat(QwenChat):
    """Qwen's template as it is: nothing stands before an image or between parts."""

    def render_parts(self, system, shown, images):
        """See `QwenChat.render_parts`."""
        parts, text = [], (self.begin_turn("system"), *system, self.next_turn("user"))
        for part in shown:
            if isinstance(part, str):
                text = *text, part
            else:
                parts, text = [*parts, text, images[part - 1]], ()
        return [*parts, text]


def read_texts(path: str = "") -> dict[str, dict[str, str]]:
    """Return the texts of the loops, by loop and name: those of a YAML file, or our own.

    Raises:
        ValueError: there is no such file, or a text is missing.
    """
    file = path or Path(__file__).with_name("published_texts.yaml")
    found = read_file(file, "file of texts (eval.published_texts)")
    for loop, names in TEXTS.items():
        own = found.get(loop)
        for name in names:
            if not isinstance(own, dict) or not isinstance(own.get(name), str):
                raise ValueError(f"{file} (eval.published_texts) has no text {loop}.{name}; docs/benchmarks.md lists its texts.")
    return found


@dataclass
class Dialogue:
    """A question in the loop.

    Attributes:
        task: the first message.
        text: the user message so far.
        image: number of the picture that it shows; 0: none.
        problems: what the policy said is wrong with the picture.
        replies: trajectories of one turn each.
        end: None until it has ended.
    """

    task: Task
    environment: ToolEnvironment
    text: str
    image: int
    problems: list[str] = field(default_factory=list)
    replies: list[Trajectory] = field(default_factory=list)
    answer: str | None = None
    end: EndReason | None = None
    calls: int = 0
    invalid: int = 0
    fault: str | None = None

    @property
    def message(self) -> Task:
        """The message as a task, with the picture as it is now."""
        images: tuple[bytes, ...] = ()
        if self.image:
            file = io.BytesIO()
            self.environment.images[self.image - 1].pixels.save(file, "PNG")
            images = (file.getvalue(),)
        return replace(self.task, images=images, question=self.text)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the picture."""
        return [self.environment.images[self.image - 1].size] if self.image else []

    def call(self, name: str, arguments: dict[str, str]) -> list[str | int] | None:
        """Run a call; return what it shows. None: it failed."""
        result = self.environment.step(Call(name, arguments))
        self.calls += result.status == CallStatus.EXECUTED
        self.invalid += result.status == CallStatus.INVALID
        if result.status == CallStatus.FAULT:
            self.end, self.fault = EndReason.FAULT, (result.error or "unknown").strip().splitlines()[-1]
        return result.parts if result.status == CallStatus.EXECUTED else None

    def finish(self, reply: str) -> None:
        """End with the answer in a reply."""
        self.answer = inside(reply, "answer")
        self.end = EndReason.VOID if self.answer is None else EndReason.ANSWERED


class Form(NamedTuple):
    """What distinguishes a loop.

    Attributes:
        tool: what it runs, by name.
        opening: returns the first message, given the text `prompt` and the question.
        take: goes on with a reply, given the texts.
    """

    tool: str
    opening: Callable[[str, str], str]
    take: Callable[[Dialogue, str, dict[str, str]], None]


class PublishedLoop:
    """A loop with its texts and its tool.

    Args:
        name: one of `FORMS`.

    Raises:
        ValueError: see `read_texts` and `tools_by_name`.
    """

    def __init__(self, name: str, cfg: Config):
        self.form, self.texts = FORMS[name], read_texts(cfg.eval.published_texts)[name]
        search = replace(cfg.search, passages=PASSAGES)
        self.tools = tools_by_name((self.form.tool,), cfg.sandbox, search, _PASSAGE)

    def first(self, task: Task) -> Task:
        """Return the first message of a task."""
        text = self.form.opening(self.texts["prompt"], task.question)
        return replace(task, question=text, parts=(), options=(), tools=(), environment="")

    def converse(
        self, collector: Collector, params, tasks: Sequence[Task], *, samples: int, seed: int, temperature: float, slots: int
    ) -> list[list[Dialogue]]:
        """Take tasks through the loop, all side by side. Returns `samples` dialogues of each."""
        plain, workers = plain_collector(collector), collector.cfg.tools.workers
        groups = [[self._begin(plain, self.first(task), f"{seed} {i}") for i in range(samples)] for task in tasks]
        every = [one for group in groups for one in group]
        try:
            with ThreadPoolExecutor(workers, "loop") as pool:
                for turn in range(REPLIES):
                    if not (going := [one for one in every if one.end is None and _fits(plain, one)]):
                        break
                    messages = [one.message for one in going]
                    batch = plain.collect(params, messages, group_size=1, seed=seed + turn, temperature=temperature, slots=slots)
                    for one, (reply,) in zip(going, batch.trajectories, strict=True):
                        one.replies.append(reply)
                    list(pool.map(self._take, going))
        finally:
            for one in every:
                one.environment.close()
        for one in every:
            one.end = EndReason.OVER_TURNS if one.end is None else one.end
        return groups

    def _take(self, one: Dialogue) -> None:
        self.form.take(one, QWEN.without_end(one.replies[-1].turns[0].text), self.texts)

    def _begin(self, collector: Collector, message: Task, seed: str) -> Dialogue:
        environment = ToolEnvironment(self.tools, collector.settings, collector.cfg.images)
        environment.reset(message)
        own = environment.fork(zlib.crc32(f"{seed} {message.uid}".encode()))
        return Dialogue(message, own, message.question, min(1, len(message.images)))


def plain_collector(collector: Collector) -> Collector:
    """Return a collector of the same policy that shows tasks as the published loop does: Qwen's template and no tools."""
    plain = Collector(
        collector.model, collector.processor, ToolSet([]), collector.cfg.changed({"tools.system": SYSTEM}), stop=collector.stop
    )
    plain.chat = UnlabelledChat()
    return plain


def inside(text: str, tag: str) -> str | None:
    """Return what stands first between <tag> and </tag>, on one line; None: nothing does."""
    found = re.search(rf"<{tag}>\s*(.*?)\s*</{tag}>", text)
    return found[1].strip() if found else None


_PASSAGE = Prompt("", tools={"search": {"description": "", "passage": "{number}. Content:{text}"}})


def _fits(collector: Collector, one: Dialogue) -> bool:
    """Return whether the message fits the prompt; where it has grown too long, the dialogue ends."""
    try:
        collector.check(replace(one.task, question=one.text), one.sizes)
    except ValueError:
        one.end = EndReason.TRUNCATED
    return one.end is None


# ---- coding -----------------------------------------------------------------------------------------------------------

_PROGRAM = re.compile(r"<code>\s*```python(.*?)```.*?</code>", re.DOTALL)
_PROBLEMS = re.compile(r"<problem>\s*(\{.*?\})\s*</problem>", re.DOTALL)
_PART = r"((?:[^\[\]:,]|\[[^\[\]]*\])+?)"
_SLICE = re.compile(rf"\[\s*{_PART}\s*:\s*{_PART}\s*,\s*{_PART}\s*:\s*{_PART}\s*\]")
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


def problems_of(reply: str) -> list[str]:
    """Return the problems that a reply names, sorted; [] where they cannot be read."""
    found = _PROBLEMS.search(reply)
    return sorted(re.findall(r"'([^']+)'", found[1])) if found else []


def _code_opening(prompt: str, question: str) -> str:
    return f"{prompt}<query> {question} <query>"  # the second tag opens, as published


def _take_code(one: Dialogue, reply: str, texts: dict[str, str]) -> None:
    if "<answer>" in reply:
        return one.finish(reply)
    if "<problem>" in reply:
        one.problems = problems_of(reply)
        first = one.problems[0] if one.problems else ""
        tip = texts.get(first if first in ("crop", "none") else "other", "").replace("{problems}", str(one.problems))
        one.text += f"\n{reply}\n{tip}" + ("" if first == "none" else "\n")
    if "<code>" in reply:
        one.text += f"\n{reply}"
        if (found := _PROGRAM.search(reply)) is None:
            one.invalid += 1
            return None
        code = found[1]
        if one.problems[:1] == ["crop"] and (box := _BOX.search(one.task.question)):
            code = crop_slices(code, [int(edge) for edge in box.groups()], one.sizes[0])
        shown = one.call("python", {"code": _around(code, one.image)})
        one.image = next((part for part in shown or () if isinstance(part, int)), one.image)
    return None


def crop_slices(code: str, box: Sequence[int], size: tuple[int, int]) -> str:
    """Return a program whose two-dimensional slices are all the box: as published, coordinates of its own are not used.

    Args:
        box: x0, y0, x1, y1 from 0 to 1000.
        size: height and width of the picture.
    """
    (x0, y0, x1, y1), (height, width) = box, size
    rows, columns = (int(y0 / 1000 * height), int(y1 / 1000 * height)), (int(x0 / 1000 * width), int(x1 / 1000 * width))
    return _SLICE.sub(f"[{rows[0]}:{rows[1]}, {columns[0]}:{columns[1]}]", code)


def _around(code: str, image: int) -> str:
    """Return a program that gives the code its picture as a file, and shows the file that it writes."""
    before = f"import os\nimages[{image}].save({INPUT!r}, 'PNG')\nif os.path.exists({OUTPUT!r}):\n    os.remove({OUTPUT!r})\n"
    after = f"\nimport os\nif os.path.exists({OUTPUT!r}):\n    show({OUTPUT!r}, {image})\n"
    return before + code.strip("\n") + after


# ---- search -----------------------------------------------------------------------------------------------------------


def _search_opening(prompt: str, question: str) -> str:
    return f"{prompt}\n<query> {question} </query>"


def _take_search(one: Dialogue, reply: str, texts: dict[str, str]) -> None:
    if "<answer>" in reply:
        return one.finish(reply)
    if "<search>" not in reply:
        return None
    if (query := inside(reply, "search")) is None:
        one.invalid += 1
        return None
    found = one.call("search", {"query": query}) or []
    one.text += f"\n{reply}\n<information> {''.join(map(str, found))} </information> "
    return None


FORMS = {
    "coding": Form("python", _code_opening, _take_code),
    "search": Form("search", _search_opening, _take_search),
}
"""By the name that a benchmark has for its loop."""
