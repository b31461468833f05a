"""Controls of an evaluation: what they replace, and that they tell an agent that looks from one that cannot."""

import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from scripted_run import crop, play, tools_with

from imagent_jax.chat import Call
from imagent_jax.evals import evaluate as job
from imagent_jax.evals.controls import CONTROLS, controlled
from imagent_jax.rl.guards import looks_unused
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ToolSet, ToolSettings, tool
from imagent_jax.types import CallResult, CallStatus, EndReason, ImageNumber, Task, TokenKind, Trajectory, Turn

pytestmark = pytest.mark.slow(3)

TASKS = 64
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def tasks():
    return [task_at(1, "test", i) for i in range(TASKS)]


@pytest.fixture(scope="module")
def run(parts, tasks):
    """Greedy answers of the shipped base to held-out tasks."""
    return lambda collector: job.evaluate(collector, parts.params, tasks, groups=32, seed=0, greedy=True, temperature=1.0)[1]


@pytest.fixture(scope="module")
def true(parts, run):
    return run(parts.collector)


def right(done):
    return np.asarray([t.right for t in done])


def environment_of(collector, task, control=None, done=(), seed=0):
    """The environment of a task, under a control or none."""
    make = controlled(control, done, seed) if control else ToolEnvironment
    environment = make(collector.tools, collector.settings, collector.cfg.images)
    environment.reset(task)
    return environment


def shown(collector, t, *control):
    """(is it an observation, true pixels, pixels shown) of every image of a trajectory, in order."""
    environment, out = environment_of(collector, t.task, *control), []
    for entry in t.images[: len(t.task.images)]:
        out.append((False, entry.image, environment.view(entry, False)))
    for turn in t.turns:
        for n in turn.call.images if turn.call else ():
            out.append((True, t.images[n - 1].image, environment.view(t.images[n - 1], True)))
    return out


def under(parts, control, done, seed, tools=None):
    """The collector of a control."""
    other = controlled(control, done, seed)
    return Collector(parts.model, parts.processor, tools or parts.tools, parts.cfg, environment=other)


def test_shuffle_replaces_what_tools_show_by_what_they_showed_in_another_task(parts, true):
    seen = [image for t in true for observed, image, _ in shown(parts.collector, t) if observed]
    assert len(seen) > TASKS / 2
    sizes = {image.size for image in seen}
    pool = {image.resize(size, BICUBIC).tobytes() for image in seen for size in sizes}
    for t in true:
        own = [image.tobytes() for _, image, _ in shown(parts.collector, t)]
        for observed, image, instead in shown(parts.collector, t, "shuffle", true, 0):
            assert instead.size == image.size and (instead.tobytes() not in own) == observed
            assert not observed or instead.tobytes() in pool
    pixels = [[i.tobytes() for t in true for _, _, i in shown(parts.collector, t, "shuffle", true, n)] for n in (0, 0, 1)]
    assert pixels[0] == pixels[1] != pixels[2]


def test_shuffle_never_shows_what_the_same_task_showed_and_draws_by_seed_and_pixels(parts):
    """Scripted crops of three tasks: what is shown instead of a crop is a crop of one of the two others."""
    boxes = [(0, 0, 400, 400), (100, 200, 700, 700), (500, 500, 999, 999), (300, 0, 600, 500)]
    said = [*[crop(1, *box) for box in boxes], "<answer>1</answer>"]
    engine = Collector(parts.model, parts.processor, parts.tools, small_config(rollout={"response_tokens": 1024}))
    done = [play(engine, task_at(1, "test", i), 0, said) for i in range(3)]
    made = [[entry.image for entry in t.images][len(t.task.images) :] for t in done]
    assert [len(crops) for crops in made] == [4, 4, 4]
    drawn = []
    for seed in range(6):
        for own, t in enumerate(done):
            shuffled = environment_of(engine, t.task, "shuffle", done, seed)
            others = [image for i, crops in enumerate(made) for image in crops if i != own]
            for entry in list(t.images)[len(t.task.images) :]:
                instead = shuffled.view(entry, True)
                sources = [k for k, o in enumerate(others) if instead.tobytes() == o.resize(entry.image.size, BICUBIC).tobytes()]
                assert len(sources) == 1 and instead.size == entry.image.size
                assert shuffled.view(entry, False).tobytes() == entry.pixels.tobytes()
                drawn.append(sources[0])
    by_seed = np.reshape(drawn, (6, 3, 4))
    assert set(drawn) == set(range(8))
    assert (by_seed != by_seed[:1]).any() and (by_seed != by_seed[..., :1]).any()
    alone = environment_of(engine, done[0].task, "shuffle", done[:1], 0)  # nobody else saw anything
    entry = done[0].images[len(done[0].task.images)]
    assert alone.view(entry, True).tobytes() == entry.pixels.tobytes()


def test_blank_is_grey_for_given_images_and_observations(parts):
    t = play(parts.collector, task_at(1, "test", 0), 0, [crop(1, 0, 0, 400, 400), "<answer>1</answer>"])
    environment = environment_of(parts.collector, t.task, "blank")
    for entry in t.images:
        for observed in (False, True):
            blank = environment.view(entry, observed)
            assert blank.size == entry.image.size and blank.getcolors() == [(blank.width * blank.height, (128, 128, 128))]
    with pytest.raises(ValueError, match="There is no control 'noise'; choose shuffle or blank"):
        controlled("noise", [], seed=0)


def test_blank_leaves_nothing_to_see_and_every_size_as_it_was(parts, true):
    grey = under(parts, "blank", true, 0)
    for t in true[:8]:
        prompts = [c.open_task(t.task).prompt for c in (parts.collector, grey)]
        for plain, blank in zip(*(prompt.images for prompt in prompts), strict=True):
            assert blank.grid == plain.grid and len(np.unique(blank.patches)) == 1 < len(np.unique(plain.patches))


def test_the_shipped_base_gets_worse_under_both_controls(parts, run, true):
    for control in ("shuffle", "blank"):
        done = run(under(parts, control, true, 0))
        assert looks_unused(right(true), right(done), control) is None, (right(true).mean(), right(done).mean())
        if control == "shuffle":  # alike until the first observation
            for t, c in zip(true, done, strict=True):
                seen = np.flatnonzero(t.kind == TokenKind.OBSERVATION)
                until = seen[0] if len(seen) else len(t.ids)
                np.testing.assert_array_equal(t.ids[:until], c.ids[:until])


def test_crops_replaced_by_noise_raise_the_warning(parts, run):
    def noise(crop, context, image, **rest):
        number = crop(context, image=image, **rest)[0]
        entry = context.registry[number]
        pixels = np.random.default_rng(number).integers(0, 256, (*entry.size, 3), dtype=np.uint8)
        return [context.show(Image.fromarray(pixels), parent=image, box=entry.box)]

    tools = tools_with(noise)
    noisy = run(Collector(parts.model, parts.processor, tools, parts.cfg))
    done = run(under(parts, "shuffle", noisy, 0, tools))
    assert "Accuracy does not drop under a control" in looks_unused(right(noisy), right(done), CONTROLS["shuffle"])


def test_the_sign_test_wants_more_than_luck():
    def pair(won, lost):
        both = np.zeros(100, bool), np.zeros(100, bool)
        both[0][:won], both[1][won : won + lost] = True, True
        return looks_unused(*both, "less")

    assert pair(0, 0) and pair(5, 5) and pair(3, 0) and pair(8, 4)
    assert pair(5, 0) is None and pair(30, 10) is None
    assert "30 % with less, 30 % without (30 tasks are right only without the control, 30 only with it)" in pair(30, 30)


def test_the_command_reports_controls_beside_the_true_accuracy(tmp_path, capsys):
    cfg = small_config(data={"cache_dir": str(tmp_path)})
    (tmp_path / "c.yaml").write_text(cfg.to_yaml())
    flags = ["--config", str(tmp_path / "c.yaml"), "--eval.tasks=8", "--control", "shuffle", "--control", "blank"]
    assert job.main(flags) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "held-out" in line and "model" in line)
    assert header.split("┃")[2:5] and [c.strip() for c in header.split("┃")[2:5]] == ["model", "shuffle", "blank"]
    for flags, words in ((["--control", "scramble"], "scramble"), (["--help"], "[--control shuffle|blank|no_tools|")):
        with pytest.raises(SystemExit):
            job.main(flags)
        said = capsys.readouterr()
        assert words in said.out + said.err


def lookup_result(*texts: str) -> CallResult:
    return CallResult(CallStatus.EXECUTED, "lookup", {"query": "x"}, [*texts])


@tool
def lookup(context, query: str) -> list[str | ImageNumber]:
    """Say two lines about a query, and show Image 1 larger.

    Args:
        query: anything
    """
    return [f"{query} is known.", context.show(context.registry[1].pixels, parent=1, origin="view"), "No more."]


def test_shuffle_replaces_texts_of_tools_and_keeps_lines_that_name_images(config, tasks):
    """Also in tasks without images, which are told apart by their question."""
    bare = [Task(f"bare/{i}", f"Who is {i}?", (), "x") for i in range(2)]

    def done(task, *texts):
        turn = Turn(0, 1, "", lookup_result(*texts))
        given = make_given(task)
        return Trajectory(
            task, 0, *[np.zeros(1)] * 3, *[np.zeros((3, 1))] * 2, turns=[turn], end=EndReason.VOID, answer=None, images=given
        )

    def make_given(task):
        environment = ToolEnvironment(ToolSet([]), ToolSettings(), config.images)
        environment.reset(task)
        return environment.images

    seen = set()
    for seed in range(12):
        make = controlled("shuffle", [done(bare[0], "own"), done(bare[1], "first", "second"), done(tasks[0], "third")], seed)
        environment = make(ToolSet([lookup]), ToolSettings(), config.images)
        environment.reset(tasks[0])
        result = environment.fork().step(Call("lookup", {"query": "this"}))
        one, line, image, other = result.parts
        assert line == f"Image {int(image)}: view of Image 1" and one in ("own", "first", "second")
        seen |= {one, other}
    assert seen == {"own", "first", "second"}
    environment.reset(bare[1])
    refused = environment.fork().step(Call("lookup", {}))
    assert refused.status == CallStatus.INVALID and "needs the argument query" in refused.parts[0]
