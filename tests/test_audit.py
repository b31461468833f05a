"""Controls tell planted agents apart: one that looks, one that ignores its tools' images, one that answers from the first image
alone, one that is hurt by calling."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from scripted_run import ANSWER, action, crop, scripted_collector

from imagent_jax.evals.audit import Line, audit, compared, is_warning, sentence
from imagent_jax.evals.controls import CONTROLS, ShuffledEnvironment, Variant, fingerprint, permuted, variants
from imagent_jax.rollout.episode import Episode
from imagent_jax.tools import ToolSet, tool
from imagent_jax.types import CallStatus, Markup, Task

COUNT = 40
ENGINE = scripted_collector(small_config(rollout={"response_tokens": 4096}))


def png(level: int) -> bytes:
    Image.new("RGB", (64, 64), (level, level, level)).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def levels(index: int) -> list[int]:
    return np.random.default_rng(index).choice(np.arange(10, 250, 8), 2, replace=False).tolist()


TASKS = [
    Task(f"t{i}", "Which image is brighter, Image 1 or Image 2?", tuple(map(png, levels(i))),
         f"Image {int(np.argmax(levels(i))) + 1}", "choice") for i in range(COUNT)
]  # fmt: skip


def mean(image: Image.Image) -> float:
    return float(np.asarray(image, float).mean())


class Agent:
    """Plays a task: looks at the given images in the prompt, may crop them, and answers by what it was shown."""

    def __init__(self, calls: int, decide):
        self.calls, self.decide = calls, decide

    def play(self, collector, task: Task):
        environment = collector.environment(task.tools)
        environment.reset(task)
        given = [mean(environment.view(entry, False)) for entry in environment.images]
        episode, seen, ids = Episode(collector.rules, task, 0, environment, 50), [], []

        def say(text: str) -> None:
            new = np.asarray(collector.processor.encode(Markup(text)), np.int32)
            episode.end_turn(new)
            ids.extend(new)

        for number in range(1, self.calls + 1) if environment.tools.names else ():
            say(crop(number, 0, 0, 999, 999))
            result = environment.step(action(crop(number, 0, 0, 999, 999)))
            entries = [environment.images[n - 1] for n in result.images]
            seen += [mean(environment.view(entry, True)) for entry in entries]
            encoded = episode.respond(result, [collector.rules.prepare(environment, entry, observed=True) for entry in entries])
            episode.observe(encoded, np.full(len(encoded.ids), -1, np.int32))
            ids.extend(encoded.ids)
        say(ANSWER.format(self.decide(given, seen, task)))
        return episode.trajectory(np.asarray(ids, np.int32), np.zeros(len(ids)))


def brighter(values) -> str:
    return f"Image {int(np.argmax(values)) + 1}"


def by_first(given, seen, task):
    """Right by Image 1 alone: the answer's number happens to be told by how bright it is."""
    return "Image 1" if given[0] > 130 else "Image 2"


AGENTS = {
    "looks": Agent(2, lambda given, seen, task: brighter(seen) if len(seen) == 2 else "Image 1"),
    "ignores its tools": Agent(2, lambda given, seen, task: brighter(given)),
    "first image alone": Agent(0, by_first),
    "hurt by calls": Agent(1, lambda given, seen, task: "none" if seen else brighter(given)),
}


@pytest.fixture(scope="module")
def audits():
    """Lines and sentences of every agent under every control."""
    found = {}
    for name, agent in AGENTS.items():
        done = [agent.play(ENGINE, task) for task in TASKS]

        def run(variant, agent=agent):
            other = scripted_collector(ENGINE.cfg, environment=variant.environment)
            return [agent.play(other, task) for task in variant.tasks]

        found[name] = *audit([*CONTROLS], done, 3, run), done
    return found


def line_of(audits, agent: str, control: str, label: str = "") -> Line:
    return next(line for line in audits[agent][0] if (line.control, line.label) == (control, label))


def warned(audits, agent: str) -> set[str]:
    lines = audits[agent][0]
    return {control for control in CONTROLS if is_warning(control, [line for line in lines if line.control == control])}


@pytest.mark.slow(2)
def test_every_agent_is_warned_of_what_is_wrong_with_it_and_of_nothing_else(audits):
    assert {name: sum(t.right for t in done) for name, (*_, done) in audits.items()}["looks"] == COUNT
    assert warned(audits, "looks") == set()
    assert warned(audits, "ignores its tools") == {"shuffle", "one_observation"}
    assert warned(audits, "first image alone") == {"shuffle", "without_image"}
    assert warned(audits, "hurt by calls") >= {"no_tools"}


@pytest.mark.slow(2)
def test_tools_off_gives_call_gain_and_call_harm(audits):
    looks, hurt = line_of(audits, "looks", "no_tools"), line_of(audits, "hurt by calls", "no_tools")
    without = sum(task.answer == "Image 1" for task in TASKS)
    assert (looks.right, looks.under, looks.won, looks.lost) == (COUNT, without, COUNT - without, 0)
    assert (hurt.right, hurt.under, hurt.won, hurt.lost) == (0, COUNT, 0, COUNT)
    said = audits["looks"][1]["no_tools"]
    assert said == (
        f"Calls help: of {COUNT - without} tasks wrong without tools, 100 % are right with them (Call Gain); of {without} right "
        "without, 0 % are wrong with them (Call Harm)."
    )
    assert "Calls hurt: of 0 tasks wrong without tools" in audits["hurt by calls"][1]["no_tools"]
    assert audits["ignores its tools"][1]["no_tools"].startswith("Calls neither help nor hurt")


@pytest.mark.slow(2)
def test_one_exchanged_observation_changes_the_answers_of_an_agent_that_looks_only(audits):
    for call in (1, 2):
        looks, blind = (line_of(audits, agent, "one_observation", f"call {call}") for agent in ("looks", "ignores its tools"))
        assert looks.tasks == blind.tasks == COUNT and blind.changed == 0 and looks.changed > COUNT / 10
        assert looks.lost == 0 and looks.won == looks.changed
    assert audits["looks"][1]["one_observation"].startswith("The agent acts on what call 1 and call 2 showed: ")
    said = audits["ignores its tools"][1]["one_observation"]
    assert said == (
        "The agent ignores what its calls show: answers that change where one observation is exchanged: 0 % of 40 after call 1, "
        "0 % of 40 after call 2."
    )
    assert audits["first image alone"][1]["one_observation"] == "No task could be compared."


@pytest.mark.slow(2)
def test_each_image_removed_finds_the_image_that_an_agent_answers_from(audits):
    first, other = (line_of(audits, "first image alone", "without_image", f"Image {i}") for i in (1, 2))
    assert first.drops and other.won == other.lost == other.changed == 0
    assert audits["first image alone"][1]["without_image"].startswith("Only Image 1 is needed: ")
    assert audits["looks"][1]["without_image"].startswith("Every image is needed by some tasks: ")
    both = [line_of(audits, "looks", "without_image", f"Image {i}") for i in (1, 2)]
    assert all(line.tasks == line.right == COUNT and line.drops for line in both)


@pytest.mark.slow(2)
def test_permuted_images_keep_the_accuracy_of_an_agent_that_looks(audits):
    looks = line_of(audits, "looks", "permute")
    assert (looks.tasks, looks.right, looks.under, looks.changed) == (COUNT,) * 4  # every answer has another number
    assert "No effect of order is shown: 100 % of 40" in audits["looks"][1]["permute"]
    assert line_of(audits, "first image alone", "permute").under < line_of(audits, "first image alone", "permute").right


@pytest.mark.slow(2)
def test_shuffled_and_blank_images(audits):
    assert audits["looks"][1]["shuffle"].startswith("Accuracy drops from 100 % to ")
    said = audits["ignores its tools"][1]["shuffle"]
    assert said.startswith("Accuracy does not drop under a control: 100 % with what another task's call returned")
    assert "(0 tasks are right only without the control, 0 only with it)" in said


# ---- parts ------------------------------------------------------------------------------------------------------------


def test_numbers_of_images_follow_their_images():
    three = tuple(png(level) for level in (10, 20, 30))
    task = Task("p", "Is Image 1 like images 2 and 3?", three, "Image 3", "choice", other_answers=("2",))
    changed = permuted(task, 0)
    old = [three.index(image) + 1 for image in changed.images]
    assert old != [1, 2, 3] and sorted(old) == [1, 2, 3] and permuted(task, 0) == changed
    new = {before: place for place, before in enumerate(old, 1)}
    assert changed.question == f"Is Image {new[1]} like images {new[2]} and {new[3]}?"
    assert changed.answers == (f"Image {new[3]}", str(new[2]))
    options = dataclasses.replace(task, answer="B", other_answers=(), options=("Image 1", "Image 2"))
    assert permuted(options, 0).options == (f"Image {new[1]}", f"Image {new[2]}") and permuted(options, 0).answer == "B"
    number = dataclasses.replace(task, answer="2", other_answers=(), answer_type="number")
    assert permuted(number, 0).answer == "2"  # a sum, no image
    seeds = {tuple(permuted(task, seed).images) for seed in range(12)}
    assert len(seeds) > 2


def test_pictures_photos_and_figures_are_images():
    task = Task("p", "Is picture 1 like 图2, or Figure 1 like photos 1 and 2?", (png(1), png(2)), "Photo 2")
    assert permuted(task, 0).question == "Is picture 2 like 图1, or Figure 2 like photos 2 and 1?"
    assert permuted(task, 0).answer == "Photo 1"


@pytest.mark.parametrize(
    "change",
    [{"images": (png(1),)}, {"question": "What is in the last image?"}, {"parts": (1, "so", 2)},
     {"question": "What colour is the car in the 2nd image?"}, {"question": "Is the former darker than the latter?"},
     {"question": "第二张图是什么颜色?"},
     {"question": "Which image shows it? Give its number.", "answer": "2", "answer_type": "number"},
     {"question": "Which image is darker?", "answer": "A", "options": ("1", "2")}],
)  # fmt: skip
def test_tasks_whose_order_means_something_are_not_permuted(change):
    task = Task("p", "Which?", (png(1), png(2)), "Image 1", "choice")
    assert permuted(task, 0) is not None and permuted(dataclasses.replace(task, **change), 0) is None


@tool
def look(context, word: str) -> str:
    """Look a word up.

    Args:
        word: word
    """
    return f"{word} is new"


def test_texts_of_calls_are_exchanged_between_tasks_by_tool():
    tools = ToolSet([look])
    texts = [(1, "look", "one"), (2, "look", "two"), (3, "other", "three")]

    def asked(own, only=None, calls=1, **how):
        given = {"pool": [], "texts": texts, "seed": 0, "only": only} | how
        environment = ShuffledEnvironment(tools, ENGINE.settings, ENGINE.cfg.images, **given)
        environment.reset(Task("a", own, (), "x"))
        environment.own = {"first": 1, "second": 2}.get(own, environment.own)
        call = action('<tool_call>{"name": "look", "arguments": {"word": "sun"}}</tool_call>')
        return [environment.step(call).parts for _ in range(calls)]

    assert asked("first") == [["two"]] and asked("second") == [["one"]]
    assert {asked("third", seed=seed)[0][0] for seed in range(9)} == {"one", "two"}
    assert asked("first", only=2, calls=3) == [["sun is new"], ["two"], ["sun is new"]]
    assert asked("first", texts=texts[:1]) == [["sun is new"]]
    assert fingerprint((), TASKS[0]) != fingerprint((), dataclasses.replace(TASKS[0], question="?"))


def test_crops_of_an_image_are_grey_with_it():
    [_, second] = variants("without_image", [SimpleNamespace(task=TASKS[0])], 0)
    environment = scripted_collector(ENGINE.cfg, environment=second.environment).environment()
    environment.reset(TASKS[0])
    for number in (1, 2):
        result = environment.step(action(crop(number, 0, 0, 500, 500)))
        entry = environment.images[result.images[0] - 1]
        assert (environment.view(entry, True).getpixel((0, 0)) == (128, 128, 128)) == (number == 2)
    assert [environment.view(entry, False).getpixel((0, 0)) == (128,) * 3 for entry in environment.images[:2]] == [False, True]


def made(right: bool, answer: str, ids=(1, 2), error=None, calls=1):
    turn = SimpleNamespace(stop=2, call=SimpleNamespace(status=CallStatus.EXECUTED))
    return SimpleNamespace(right=right, answer=answer, ids=np.asarray(ids), error=error, turns=[turn] * calls)


def test_what_is_compared():
    true = [made(True, "a"), made(True, "a"), made(False, "b"), made(True, "a", error="x"), made(True, "a")]
    under = [made(False, "b"), made(True, "a"), made(True, "a"), made(False, "b"), made(False, "b", ids=(1, 3))]
    whole = compared(Variant("blank", "", range(5), []), true, under)
    assert whole == Line("blank", "", 4, right=3, under=2, won=2, lost=1, changed=3)
    prefix = compared(Variant("one_observation", "call 1", range(5), [], None, 1), true, under)
    assert prefix == Line("one_observation", "call 1", 3, right=2, under=2, won=1, lost=1, changed=2)  # the last has other tokens
    none = compared(Variant("one_observation", "call 2", range(5), [], None, 2), true, under)
    assert none.tasks == 0 and sentence("one_observation", [none]) == "No task could be compared."
