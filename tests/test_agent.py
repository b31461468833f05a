"""The library's face: an agent in a few lines, what the package exports, and the `imagent` command."""

import io
import subprocess
import sys

import numpy as np
import pytest
from conftest import small_config
from PIL import Image

import imagent_jax
from imagent_jax import cli
from imagent_jax.agent import Agent, encoded
from imagent_jax.config import MeshConfig
from imagent_jax.runs.folder import RunFolder
from imagent_jax.tiny.world import task_at
from imagent_jax.types import Task, Trajectory, Turn


@pytest.fixture(scope="module")
def agent(parts):
    return Agent(parts)


@pytest.fixture(scope="module")
def task():
    return next(task for i in range(30) if (task := task_at(1, "test", i)).kind == "sum")


def same(a: Trajectory, b: Trajectory) -> bool:
    return np.array_equal(a.ids, b.ids) and a.end == b.end and a.answer == b.answer


def test_an_answer_is_a_rollout_of_the_question(agent, parts, task):
    alone = Task("question", task.question, task.images, "")
    for temperature, seed in ((0.0, 0), (1.0, 3)):
        [[expected]] = parts.collector.collect(
            parts.params, [alone], group_size=1, seed=seed, temperature=temperature
        ).trajectories
        t = agent.answer(task.question, task.images, temperature=temperature, seed=seed)
        assert same(t, expected) and len(t.images) == len(expected.images) and t.turns[-1].text == expected.turns[-1].text
    assert not same(agent.answer(task.question, task.images, temperature=2.0, seed=1), t)


def test_a_stream_yields_every_turn_once_its_call_is_answered_and_then_the_trajectory(agent, task):
    *turns, t = agent.stream(task.question, task.images)
    assert isinstance(t, Trajectory) and turns == t.turns and all(isinstance(turn, Turn) for turn in turns)
    assert len(turns) > 1 and [turn.call is not None for turn in turns] == [True] * (len(turns) - 1) + [False]


def test_images_are_files_bytes_or_pixels(agent, task, tmp_path):
    pixels = [Image.open(io.BytesIO(data)) for data in task.images]
    paths = [tmp_path / f"{i}.png" for i in range(len(pixels))]
    for image, path in zip(pixels, paths, strict=True):
        image.save(path)
    expected = agent.answer(task.question, [path.read_bytes() for path in paths])
    for images in (paths, list(map(str, paths)), [image.convert("RGB") for image in pixels]):
        assert same(agent.answer(task.question, images), expected)
    with pytest.raises(ValueError, match="There is no image .*nowhere.png; name a file"):
        agent.answer("?", [tmp_path / "nowhere.png"])
    with pytest.raises(ValueError, match="Task question: Image 1 cannot be used"):
        agent.answer("?", [b"no image"])
    assert encoded(b"as it is") == b"as it is"


@pytest.mark.slow(5)
def test_agents_come_from_the_base_from_runs_and_from_folders_of_models(agent, parts, task, tmp_path):
    base = Agent.from_pretrained("tiny", settings={"tools.max_turns": 3})
    cfg = base.policy.cfg
    assert cfg.tools.max_turns == 3 and cfg.images.vision_block == 96
    assert same(base.answer(task.question, task.images), agent.answer(task.question, task.images))
    folder = RunFolder(small_config(run={"dir": str(tmp_path), "name": "run"}, tools={"max_turns": 2}))
    learner_params = parts.params.filter(lambda path, _: "vision" not in path)
    folder.save(4, learner_params, {}, {})
    folder.close()
    run = Agent.from_pretrained(tmp_path / "run", mesh=MeshConfig(data=1))
    assert run.policy.cfg.tools.max_turns == 2
    assert same(run.answer(task.question, task.images), agent.answer(task.question, task.images))
    large = Agent.from_pretrained(parts.folder, settings={"rollout.prompt_tokens": 512, "rollout.response_tokens": 256})
    assert large.policy.cfg.images.vision_block == 5120 and large.policy.cfg.rollout.prompt_tokens == 512
    with pytest.raises(ValueError, match="There is no setting 'tools.turns'; did you mean"):
        Agent.from_pretrained("tiny", settings={"tools.turns": 3})
    with pytest.raises(ValueError, match="holds no finished checkpoint 3; there are 4"):
        Agent.from_pretrained(tmp_path / "run", step=3)


def test_every_public_name_exists_and_importing_the_package_is_light():
    code = "import sys; before = set(sys.modules); import imagent_jax; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "imagent_jax" in loaded and {name.split(".")[0] for name in loaded} <= {"imagent_jax", *sys.stdlib_module_names}
    assert [name for name in loaded if name.startswith("imagent_jax.")] == []
    assert 8 <= len(imagent_jax.__all__) <= 16 and imagent_jax.__all__ == sorted(imagent_jax.__all__)
    assert all(getattr(imagent_jax, name).__name__ == name for name in imagent_jax.__all__ if name != "tool")
    assert set(imagent_jax.__all__) < set(dir(imagent_jax)) and imagent_jax.tool.__name__ == "tool"
    with pytest.raises(AttributeError, match="has no attribute 'Agents'"):
        imagent_jax.Agents  # noqa: B018


def test_the_command_passes_on_and_lists_what_there_is(monkeypatch, capsys):
    import imagent_jax.view as view

    monkeypatch.setattr(view, "main", lambda argv: len(argv))
    assert cli.main(["view", "runs/tiny", "--no-open"]) == 2 and cli.main(["view"]) == 0
    for argv, code, words in (([], 2, "usage: imagent COMMAND"), (["--help"], 0, "train "), (["trian"], 2, "no command 'trian'")):
        assert cli.main(argv) == code
        said = capsys.readouterr()
        assert words in (said.out if code == 0 else said.err)
    for name in cli.COMMANDS:
        assert callable(__import__(f"imagent_jax.{name}", fromlist=["main"]).main)
