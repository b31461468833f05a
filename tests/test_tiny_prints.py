"""Prints and the code world: deterministic, right, held out; spoilt unreadable and repaired readable to a template matcher."""

import collections
import io
import re

import numpy as np
import print_reader
import pytest
from PIL import Image
from print_reader import shown_by

from imagent_jax.tiny import prints, world
from imagent_jax.tiny.code_world import KIND_MIX, SHARES, draw_problems, task_at
from imagent_jax.tiny.generated import GeneratedTasks
from imagent_jax.tiny.prints import LOSSES, OPERATIONS, PROBLEMS, SIDE, STRENGTHS, TURNS, make_print, program, repair, spoil

# ---- prints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", world.SPLITS)
def test_a_print_is_a_framed_photograph_with_large_tags_of_its_split(split):
    rng, names = np.random.default_rng(0), {name for name, _ in world.photographs(split)}
    _, by_label = world.handwritten_digits(split)
    for colours in (["red"], ["blue", "green"]) * 8:
        digits = rng.integers(0, 10, len(colours)).tolist()
        scene = make_print(rng, split, colours, digits)
        assert scene.pixels.shape == (SIDE, SIDE, 3) and scene.photo in names
        assert (scene.pixels[-prints.FOOT :] == 0).all() and (scene.pixels[: prints.MOUNT] == 255).all()
        assert [(tag.colour, tag.digit) for tag in scene.tags] == list(zip(colours, digits, strict=True))
        assert all(row in by_label[digit] for row, digit in zip(scene.digit_rows, digits, strict=True))
        for tag in scene.tags:
            x, y = round(tag.x * SIDE), round(tag.y * SIDE)
            patch = scene.pixels[y - 30 : y + 30, x - 30 : x + 30].reshape(-1, 3).mean(0)
            nearest = min(world.COLOURS, key=lambda c: np.abs(np.asarray(world.RGB[c]) * world.TAG_VALUE - patch).sum())
            assert nearest == tag.colour
        xs = [tag.x for tag in scene.tags]
        assert xs == sorted(xs) and (len(xs) == 1 or (xs[1] - xs[0]) * SIDE >= prints.TILE)


def test_problems_are_those_of_mat_alone_and_in_pairs_with_a_turn():
    singles = [p for p in PROBLEMS if len(p) == 1]
    pairs = [p for p in PROBLEMS if len(p) == 2]
    assert PROBLEMS[0] == () and {name for (name,) in singles} == {*TURNS, *LOSSES} and len(singles) == 8
    assert set(pairs) == {(turn, loss) for turn in TURNS for loss in LOSSES} and len(PROBLEMS) == 1 + 8 + 15
    for name in STRENGTHS["train"]:
        assert not set(STRENGTHS["train"][name]) & set(STRENGTHS["test"][name])
    rng, counts = np.random.default_rng(1), collections.Counter()
    for _ in range(2000):
        problems = draw_problems(rng)
        counts[bool({*problems} & {*TURNS}), bool({*problems} & {*LOSSES})] += 1
    assert np.allclose([counts[k] / 2000 for k in ((0, 0), (1, 0), (0, 1), (1, 1))], SHARES, atol=0.04)


@pytest.mark.parametrize("problems", [("rotation90",), ("rotation180",), ("rotation270",), ("crop",), ("rotation90", "crop")])
def test_turns_and_cuts_are_undone_to_the_pixel(problems):
    rng = np.random.default_rng(2)
    scene = make_print(rng, "test")
    spoilt = spoil(rng, scene.pixels, problems, "test")
    assert np.abs(spoilt.astype(int) - scene.pixels).mean() > 20
    assert np.array_equal(shown_by(program(1, repair(problems)), spoilt), scene.pixels)


def test_a_turned_and_cut_print_is_not_repaired_in_the_other_order():
    rng = np.random.default_rng(3)
    scene = make_print(rng, "test")
    spoilt = spoil(rng, scene.pixels, ("rotation90", "crop"), "test")
    other = shown_by(program(1, repair(("rotation90", "crop"))[::-1]), spoilt)
    assert np.abs(other.astype(int) - scene.pixels).mean() > 20


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("turn", 90, lambda image: image.rotate(90)),
        ("brighten", 14, lambda image: Image.fromarray(np.minimum(np.asarray(image).astype(int) * 14, 255).astype(np.uint8))),
        ("darken", 4, lambda image: Image.fromarray(np.maximum(255 - 4 * (255 - np.asarray(image).astype(int)), 0).astype("u1"))),
        ("shift", 42, lambda image: Image.fromarray(np.roll(np.asarray(image), 42, 1))),
    ],
)
def test_a_step_is_what_its_words_say(name, argument, expected):
    scene = make_print(np.random.default_rng(4), "train")
    for pixels in (scene.pixels, scene.pixels // 16):
        code = program(1, [(name, argument)])
        assert np.array_equal(shown_by(code, pixels), np.asarray(expected(Image.fromarray(pixels))))
    assert str(argument) in prints.in_words([(name, argument)])


def test_a_print_of_unknown_colours_is_refused():
    for colours in (["pink"], ["red", "red"], ["red", "blue", "green"], []):
        with pytest.raises(ValueError, match="A print takes one or two different colours of red"):
            make_print(np.random.default_rng(0), "train", colours, [1] * len(colours))
    with pytest.raises(ValueError, match="no split"):
        make_print(np.random.default_rng(0), "validation")


# ---- what can be read; `benchmarks/tool_worlds.py` tries every repair on every fault -------------------------------------


@pytest.fixture(scope="module")
def reader():
    return print_reader.reader()


@pytest.mark.slow(20)
@pytest.mark.parametrize("problem", [*TURNS, *LOSSES])
def test_a_spoilt_print_is_read_after_its_own_repair_alone(reader, problem):
    tried = repair((problem,)), [], print_reader.likeliest_other(problem)
    repaired, spoilt, other = (print_reader.accuracy(reader, (problem,), steps, 80) for steps in tried)
    assert repaired >= 0.80 and spoilt <= 0.45
    assert other <= {"noise": 0.45, "blur": 0.45}.get(problem, 0.25)
    assert repaired > max(spoilt, other) + 0.4


@pytest.mark.slow(10)
@pytest.mark.parametrize("problems", [("rotation90", "noise"), ("rotation180", "dark"), ("rotation270", "crop")])
def test_a_print_with_two_faults_needs_both_repairs(reader, problems):
    both = print_reader.accuracy(reader, problems, repair(problems), 80)
    halves = [print_reader.accuracy(reader, problems, [step], 80) for step in repair(problems)]
    assert both >= 0.60 and max(halves) <= 0.45


@pytest.mark.slow(10)
@pytest.mark.parametrize("view", [56, 168])
def test_no_zoom_reads_a_spoilt_print(reader, view):
    assert print_reader.accuracy(reader, (), [], 80, view=view) >= 0.75
    for problem in ("rotation180", "dark", "overexposure", "crop"):
        assert print_reader.accuracy(reader, (problem,), [], 80, view=view) <= 0.28, problem


@pytest.mark.slow(10)
def test_the_large_view_of_a_page_shows_more_of_its_digits_than_the_given_one():
    given, large = (print_reader.page_accuracy(view, 1000, 240) for view in (84, 168))
    assert large > 0.68 and given < 0.64 and large**3 > 1.5 * given**3  # a sum of three digits needs all of them


# ---- tasks --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    return [task_at(7, "test", index) for index in range(60)]


def test_a_code_task_is_a_function_of_seed_split_and_index(tasks):
    assert [task_at(7, "test", index) for index in (0, 31)] == [tasks[0], tasks[31]]
    others = task_at(8, "test", 0), task_at(7, "train", 0), task_at(7, "test", 1)
    assert all(other.images != tasks[0].images for other in others)
    assert tasks[3].uid == "tiny_code/test/7/3"
    for begin in range(0, 60, 10):
        assert collections.Counter(task.kind for task in tasks[begin : begin + 10]) == KIND_MIX


def test_every_answer_of_the_code_world_follows_from_the_tags(tasks):
    for task in tasks:
        tags = [{tag["colour"]: tag["digit"] for tag in image} for image in task.meta["tags"]]
        assert all(len(image) == 1 for image in tags) and len(tags) == len(task.images) == len(task.meta["problems"])
        named = [(int(n), c) for c, n in re.findall(r"(\w+) tag in Image (\d)", task.question)]
        if task.kind == "code_compare":
            colour = re.search(r"its (\w+) tag", task.question)[1]
            named = [(int(n), colour) for n in re.findall(r"Image (\d)", task.question)]
        digits = [tags[n - 1][colour] for n, colour in named]
        assert sorted(map(tuple, task.meta["targets"])) == sorted(named)
        if task.kind == "code_compare":
            assert digits[0] != digits[1] and task.answer == f"Image {named[int(digits[1] > digits[0])][0]}"
        else:
            assert task.answer == str(sum(digits)) and len(digits) == {"code_read": 1, "code_sum": 2}[task.kind]


def test_a_code_task_shows_its_prints_with_the_problems_that_it_names(tasks):
    """Repaired by the program of its problems, every image shows its tag's colour where the tag is."""
    kinds = set()
    for task in tasks[:30]:
        for encoded, problems, ((tag),) in zip(task.images, task.meta["problems"], task.meta["tags"], strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
            fixed = shown_by(program(1, repair(problems)), pixels)
            x, y = round(tag["x"] * SIDE), round(tag["y"] * SIDE)
            patch = fixed[y - 28 : y + 28, x - 28 : x + 28].reshape(-1, 3).mean(0)
            hues = {c: np.subtract(rgb, min(rgb)) / (max(rgb) - min(rgb)) for c, rgb in world.RGB.items()}
            hue = (patch - patch.min()) / (patch.max() - patch.min())
            assert min(hues, key=lambda c: np.abs(hues[c] - hue).sum()) == tag["colour"], (problems, tag)
            kinds.add(tuple(problems))
    assert len(kinds) > 12


def test_generated_tasks_are_a_sequence_of_the_series():
    tasks = GeneratedTasks(task_at, 7, "test", 5)
    assert len(tasks) == 5 and tasks[-1] == tasks[4] == task_at(7, "test", 4) and tasks[1:3] == [tasks[1], tasks[2]]
    assert tasks.faults == ()
    with pytest.raises(IndexError, match="no task 5 among 5"):
        tasks[5]


def test_operations_have_an_argument_that_repairs_nothing_beside_the_one_that_does():
    for name, argument in prints.REPAIRS.values():
        assert argument in OPERATIONS[name].arguments
    assert {name for name, operation in OPERATIONS.items() if len(operation.arguments) > 1} == {
        "turn",
        "brighten",
        "darken",
        "shift",
    }
