"""A run of a scripted policy on disk, as the main job leaves one, and a browser to look at it."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from conftest import tiny_config
from playwright.sync_api import Browser, sync_playwright

from imagent_jax.chat import QWEN, Call, MalformedCall
from imagent_jax.config import Config
from imagent_jax.model.families import read_folder
from imagent_jax.model.interleave import Encoded
from imagent_jax.model.processor import Processor
from imagent_jax.model.vlm import Model, abstract
from imagent_jax.rl.rewards import reward_functions, score_trajectories
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.episode import Episode
from imagent_jax.rollout.metrics import summarise
from imagent_jax.runs.folder import RunFolder
from imagent_jax.runs.trajectory_log import TrajectoryLog
from imagent_jax.tiny.base import base_folder
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import VISUAL_TOOLS, ImageRegistry, ToolSet, ToolSettings, tool
from imagent_jax.types import CallResult, EndReason, Markup, Task, TokenKind, ToolError, Trajectory, Turn

EVIL = "Is </script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> 日本語 in Image 1?"
ANSWER = "<answer>{}</answer><|im_end|>"


@tool
def broken(context) -> str:
    """Fails."""
    raise OSError("the disk is full")


def crop(image: int, *box: int) -> str:
    return QWEN.render_call("visual_confirmation", {"image": image, "label": "red", "bbox_2d": list(box)})


@functools.cache
def without_weights() -> tuple[Model, Processor]:
    """The shipped base's model, as far as it needs no weights, and its processor."""
    return abstract(read_folder(base_folder()))[0], Processor.from_pretrained(base_folder())


def scripted_collector(cfg: Config, **options) -> Collector:
    """A collector for `play`, with the visual tools and a broken one."""
    return Collector(*without_weights(), ToolSet([*VISUAL_TOOLS.values(), broken]), cfg, **options)


def action(text: str) -> Call | MalformedCall:
    """The call in a text; a text without one is malformed."""
    try:
        return QWEN.parse_call(text)
    except ToolError as error:
        return MalformedCall(str(error))


def execute(tools: ToolSet, text: str, registry: ImageRegistry, settings: ToolSettings) -> CallResult:
    """Run the call in a text."""
    return tools.execute(action(text), registry, settings)


def see(collector: Collector, episode: Episode, call: Call | MalformedCall) -> Encoded | None:
    """Run the call of an episode at once, and give the episode the result."""
    environment = episode.environment
    result = environment.step(call)
    images = [collector.rules.prepare(environment, environment.images[n - 1], observed=True) for n in result.images]
    return episode.respond(result, images)


def play(collector: Collector, task: Task, rollout: int, texts: list[str]) -> Trajectory:
    """The trajectory of a policy that says `texts`, by the project's own episode; log-probabilities are drawn.

    Like the engine, it stops where the response's buffer is full.
    """
    opened, ids = collector.open_task(task), []
    episode = Episode(collector.rules, task, rollout, opened.environment, opened.prompt.next_position, opened.error)
    for text in texts:
        said = np.asarray(collector.processor.encode(Markup(text)), np.int32)[: collector.rules.response_tokens - len(ids)]
        ids += said.tolist()
        if (call := episode.end_turn(said)) is None:
            break
        if (shown := see(collector, episode, call)) is None:
            break
        ids += shown.ids.tolist()
        episode.observe(shown, shown.vision([0] * len(shown.images)))
    logprobs = -np.random.default_rng(len(ids) + rollout).exponential(0.4, len(ids))
    return episode.trajectory(np.asarray(ids, np.int32), logprobs)


def finished(
    task: Task, texts: list[str], answer: str | None, end: EndReason = EndReason.ANSWERED, calls: list[CallResult] = (),
    rollout: int = 0,
) -> Trajectory:  # fmt: skip
    """A hand-made trajectory: a turn of two tokens for every text, and an observation of three after each of `calls`."""
    turns, kind = [], []
    for text, call in zip(texts, [*calls, *[None] * (len(texts) - len(calls))], strict=True):
        turns.append(Turn(len(kind), len(kind) + 2, text, call))
        kind += [TokenKind.TEXT] * 2 + [TokenKind.OBSERVATION] * (3 if call else 0)
    n = len(kind)
    return Trajectory(task, rollout, np.zeros(n, np.int32), np.zeros(n, np.float32), np.asarray(kind, np.uint8),
                      np.zeros((3, n), np.int32), np.full(n, -1, np.int32), turns, end, answer)  # fmt: skip


def scripts(task: Task) -> list[list[str]]:
    """What the eight rollouts of a group say."""
    right, wrong, new = ANSWER.format(task.answer), ANSWER.format("none of them"), len(task.images) + 1
    again = crop(1, 100, 100, 400, 400)
    reflection = QWEN.render_call("visual_reflection", {"images": [1, 2], "resolution": "high"})
    return [
        ["Look closer.\n" + crop(2, 250, 300, 650, 800), crop(new, 0, 500, 500, 1000), "So.\n" + right],
        [crop(1, 500, 500, 900, 900), "Ünï 日本 " + wrong],
        [crop(1, 900, 100, 200, 300), crop(1, 200, 100, 900, 300), right],
        [again, again, again, right],
        [reflection, crop(new, 300, 300, 700, 700), right],
        [wrong],
        ["I do not know.<|im_end|>"],
        [QWEN.render_call("broken", {}), right],
    ]


def metrics_of(step: int, rng) -> dict[str, float]:
    """A step's metrics of a run that learns."""
    right = 0.2 + 0.5 * (1 - math.exp(-step / 12)) + rng.normal() * 0.03
    parts = {"decode": 0.9, "vision": 0.4, "train": 2.7}
    times = {f"time/{name}": abs(rng.normal(mean, mean / 9)) for name, mean in parts.items()}
    return {
        "step": step, "reward/answer": right, "reward/format": 0.9, "reward/tool_gain": right * 0.8,
        "reward/total": 1.2 * right, "accuracy": right, "tools/calls": 1 + right, "tools/invalid": 0.2 / step,
        "mask/dropped_tokens": 0.2 / step, "mask/dropped_trajectories": 0.1 / step, "entropy": 0.3 / (1 + step / 9),
        "kl/sampler": 1e-3 * abs(rng.normal()),
        "grad_norm": abs(rng.normal(0.3, 0.1)), "groups/flat": 0.1, "length": 60 + step, "end/fault": 0.125, **times,
        "time/step": sum(times.values()) + 0.1, "time/total": 30 + 4.2 * step,
    }  # fmt: skip


def make_run(folder: Path, steps: int = 3):
    """A run's folder as the main job leaves it: three held-out evaluations, `steps` steps of two groups of eight."""
    cfg = tiny_config({
        "run": {"dir": str(folder), "name": "demo", "steps": steps}, "tools": {"max_turns": 3},
        "rollout": {"prompt_tokens": 512, "response_tokens": 512},
    })  # fmt: skip
    run, collector = RunFolder(cfg), scripted_collector(cfg)
    log, rng = TrajectoryLog(run, collector.processor, cfg), np.random.default_rng(0)
    tasks = [task_at(3, "train", i) for i in range(2 * steps)]
    tasks[0] = dataclasses.replace(tasks[0], question=EVIL)
    held_out = [task_at(3, "test", i) for i in range(6)]

    def evaluation(step: int, name: str, lines: list[int]) -> list[Trajectory]:
        done = [play(collector, task, 0, scripts(task)[line]) for task, line in zip(held_out, lines, strict=True)]
        log.write(step, [[t] for t in done], name=name)
        return done

    base = evaluation(0, "base", [1, 1, 5, 6, 0, 2])
    run.log({"step": 0, "time/evaluation": 9.0} | {f"base/{k}": v for k, v in summarise(base).items()})
    logged = {}
    for step in range(1, steps + 1):
        asked = tasks[2 * step - 2 : 2 * step]
        groups = [[play(collector, t, g, texts) for g, texts in enumerate(scripts(t))] for t in asked]
        rewards = [score_trajectories(group, reward_functions(cfg.reward)) for group in groups]
        totals = np.asarray([[r["total"] for r in group] for group in rewards])
        advantages = (totals - totals.mean(1, keepdims=True)) / totals.std(1, keepdims=True)
        log.write(step, groups, rewards, advantages)
        run.log(metrics_of(step, rng))
        logged[step] = (groups, advantages)
    trained = evaluation(steps, "trained", [0, 4, 0, 2, 1, 0])
    run.log({"step": steps, "time/total": 40 + 4.2 * steps} | {f"final/{k}": v for k, v in summarise(trained).items()})
    run.log_faults(["train.jsonl, line 7: images: a.png does not decode"])
    run.close()
    return cfg, run.path, logged


def new_log(folder: Path) -> TrajectoryLog:
    """The empty trajectory log of a new run."""
    cfg = tiny_config({"run": {"dir": str(folder), "name": "new"}})
    run = RunFolder(cfg)
    run.close()
    return TrajectoryLog(run, Processor.from_pretrained(base_folder()), cfg)


def many_trajectories(path: Path, folder: Path, steps: int = 65) -> Path:
    """A copy in `folder` of the run at `path`, with its second step's trajectories again in every step up to `steps`."""
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("view", "checkpoints"))
    lines = records(path, "train-000002")
    for step in range(4, steps + 1):
        named = [json.dumps(record | {"task": f"{record['task']}/{step}"}) for record in lines]
        (folder / "trajectories" / f"train-{step:06d}.jsonl").write_text("\n".join(named))
    return folder


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium without a window: the system's, or else the one that playwright fetches."""
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if system is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    quiet = [f"--disable-{what}" for what in ("gpu", "background-networking", "component-update", "sync")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox", *quiet])
        yield browser
        browser.close()


def look(page, path: Path, name: str = "") -> None:
    """Opens the page of a run at a trajectory, or goes there."""
    page.goto(f"{(path / 'view' / 'index.html').as_uri()}#{name}")
    page.wait_for_selector(f'#page[data-ready="{name}"]' if name else "#page[data-ready]")
    page.wait_for_function("[...document.querySelectorAll('canvas')].every((c) => c.dataset.drawn)")


def records(path: Path, stem: str) -> list[dict]:
    """The records of a log file."""
    return [json.loads(line) for line in (path / "trajectories" / f"{stem}.jsonl").read_text().splitlines()]


def tools_with(confirm: Callable) -> ToolSet:
    """The visual tools, visual_confirmation being `confirm(crop, context, image, **rest)`, `crop` being the real one."""

    @tool
    def visual_confirmation(context, image: int, bbox_2d: tuple[float, float, float, float], label: str = "") -> list:
        """Crop and enlarge.

        Args:
            image: image number
            bbox_2d: box
        """
        return confirm(VISUAL_TOOLS["visual_confirmation"], context, image, bbox_2d=bbox_2d, label=label)

    return ToolSet([VISUAL_TOOLS["visual_reflection"], visual_confirmation])
