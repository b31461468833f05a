# %% [markdown]
# # imagent-jax: an agent that learns to look again
#
# A small Qwen2-VL policy is shown several photographs with coloured tags and asked about them. At the size at which it
# sees them, the handwritten digits on the tags cannot be read. It has two tools: `visual_reflection` shows images again
# and `visual_confirmation` cuts out a box and enlarges it. It is trained by reinforcement learning from right and wrong
# answers alone. Everything here runs on a CPU, without a network after installing.

# %% Install (once; needed in a fresh environment only)
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("imagent_jax") is None:  # from a clone of the repository, in its folder `notebooks`
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "..[plot]"], check=True)

# %% Settings of this demo: 60 steps take a few minutes on two idle CPU cores; the main job trains for 120 (`run.steps`)
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress")  # bars of downloads, of which there are none
STEPS = int(os.environ.get("IMAGENT_DEMO_STEPS", "60"))
TASKS = int(os.environ.get("IMAGENT_DEMO_TASKS", "128"))  # held-out tasks asked before and after
RUNS = Path(os.environ.get("IMAGENT_DEMO_RUNS", "runs"))

# %% [markdown]
# ## The tasks
# Two to four images, a question, an answer. Photographs and handwriting of the held-out split do not occur in training.

# %%
import io

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from imagent_jax.tiny.world import task_at

for i in range(3):
    task = task_at(0, "test", i)
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.4))
    for number, axis in enumerate(axes):
        axis.axis("off")
        if number < len(task.images):
            axis.imshow(Image.open(io.BytesIO(task.images[number])))
            axis.set_title(f"Image {number + 1}", fontsize=9)
    figure.suptitle(f"{task.question}  ({task.answer})", fontsize=10)
    plt.show()

# %% [markdown]
# ## The base fails
# The shipped base can see tags, read crops and write calls. It was never shown which call a question needs: it calls on
# anything, or guesses.

# %%
from dataclasses import replace

import jax

from imagent_jax.config import TINY, load_config
from imagent_jax.evals.evaluate import comparison, evaluate
from imagent_jax.rollout.policy import Policy, training_mesh
from imagent_jax.runs.interrupt import Interrupt
from imagent_jax.train import train

cfg = load_config(TINY).changed({
    "run.name": "demo", "run.dir": str(RUNS), "run.steps": STEPS, "run.checkpoint_every": 20,
    "run.resume": any(RUNS.glob("demo/checkpoints/[0-9]*")),
    "rollout.groups": 8 if STEPS < 10 else 16, "grpo.length_buckets": 1 if STEPS < 10 else 4,  # less to compile
    "eval.tasks": TASKS, "eval.groups": min(TASKS, 64), "eval.every": 0,
})  # fmt: skip
base = Policy(cfg)
tasks = base.test_tasks(TASKS)


def ask(parts):
    """Figures and trajectories of one answer to each of the held-out tasks."""
    return evaluate(parts.collector, parts.params, tasks, groups=cfg.eval.groups, seed=cfg.eval.seed, greedy=False,
                    temperature=1.0)  # fmt: skip


before, said_before = ask(base)
print(f"{100 * before['accuracy']:.0f} % of {TASKS} held-out tasks right, {before['tools/calls']:.2f} calls a task")


# %% What the agent did, turn by turn: boxes are where its crops were cut, on the right is what it then saw
def show(trajectory):
    images, given = trajectory.images, len(trajectory.task.images)
    made = [entry for entry in images if entry.number > given]
    figure, axes = plt.subplots(1, given + len(made), figsize=(2.3 * (given + len(made)), 2.6), squeeze=False)
    for axis, entry in zip(axes[0], images, strict=True):
        small = entry.image.resize(entry.shown[::-1], Image.Resampling.BICUBIC)  # as the policy sees it
        axis.imshow(small if entry.number > given else entry.image)
        axis.set_title(entry.describe(), fontsize=8)
        axis.axis("off")
    for entry in made:
        if entry.box and entry.parent <= given:
            left, top, right, bottom = entry.box
            axes[0][entry.parent - 1].add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, color="red", linewidth=2)
            )
    plt.show()
    right = trajectory.answer == trajectory.task.answer
    print(f"{trajectory.task.question}  truth {trajectory.task.answer}, {'right' if right else 'WRONG'}")
    for turn in trajectory.turns:
        print("  agent:", turn.text.replace("\n", " "))
        if turn.call:
            print("  tool: ", turn.call.status.name.lower(), *(f"shows Image {n}" for n in turn.call.images))


for t in [t for t in said_before if t.answer != t.task.answer][:2]:
    show(t)

# %% [markdown]
# ## Training
# One call, as `python -m imagent_jax.train` makes it: groups of rollouts with tools, rewards, advantages, the two-level
# mask, an update. Nobody shows it a solved task. Guards warn in plain words if it gives up its tools, or collects a
# bonus without better answers. Run again after an interruption, it goes on from the newest checkpoint; so it did for
# the outputs stored here, whose 60 steps were made in an earlier sitting (the curves below are theirs).

# %%
from rich.console import Console

console = Console(force_jupyter=False, force_terminal=False, width=120)  # plain text, as on a terminal
with Interrupt() as interrupt, jax.set_mesh(training_mesh(cfg)):
    after = train(cfg, console, interrupt)

# %% [markdown]
# ## The agent uses its tools
# The same held-out tasks, asked of the trained agent. First those that the base got wrong.

# %%
run = RUNS / "demo"
agent = Policy(replace(cfg, model=replace(cfg.model, path=str(run / "model"))))
after, said_after = ask(agent)
console.print(comparison({"base": before, "trained": after}, f"{STEPS} steps"))
pairs = zip(said_before, said_after, strict=True)
repaired = [now for was, now in pairs if was.answer != was.task.answer and now.answer == now.task.answer]
for t in sorted(repaired, key=lambda t: -t.executed_calls)[:4]:
    show(t)

# %% [markdown]
# ## Curves

# %%
import json

steps = [record for record in map(json.loads, (run / "metrics.jsonl").open()) if "reward/total" in record]
curves = {"reward/total": "reward", "accuracy": "right answers", "tools/calls": "calls a rollout", "entropy": "entropy"}
figure, axes = plt.subplots(1, len(curves), figsize=(14, 2.8))
for axis, (key, title) in zip(axes, curves.items(), strict=True):
    axis.plot([r["step"] for r in steps], [r[key] for r in steps])
    axis.set(title=title, xlabel="step")
plt.tight_layout()
plt.show()
for name, sentence in {name: s for r in steps for name, s in r.get("warnings", {}).items()}.items():
    print(f"warning ({name}): {sentence}")
print(f"Report: {run}/report.html. Every trajectory in the browser: python -m imagent_jax.view {run}")

# %% [markdown]
# ## Does it use what it sees?
# Once more, but every image that a tool shows is replaced by one seen in another task. An agent that looks gets worse.

# %%
from imagent_jax.evals.controls import controlled
from imagent_jax.rollout.collect import Collector

environment = controlled("shuffle", said_after, seed=0)
collector = Collector(agent.model, agent.processor, agent.tools, cfg, environment=environment)
with jax.set_mesh(agent.mesh):
    shuffled, _ = evaluate(collector, agent.params, tasks,
                           groups=cfg.eval.groups, seed=cfg.eval.seed, greedy=False, temperature=1.0)  # fmt: skip
print(f"right answers: {100 * after['accuracy']:.0f} % truly, {100 * shuffled['accuracy']:.0f} % with shuffled crops")

# %% [markdown]
# ## A real model on a GPU or a TPU
# The same program trains Qwen2-VL-2B. On a runtime with an accelerator (in Colab: Runtime, Change runtime type) install
# the extra for it, and name a config and your data, JSON Lines of questions with several images (not run here):
#
# ```
# pip install -e "..[cuda]"        # or "..[tpu]" on a TPU VM
# python -m imagent_jax.train --config ../configs/qwen2_vl_2b_gpu.yaml --data.path my_tasks
# python -m imagent_jax.export runs/qwen2_vl_2b my_agent     # a Hugging Face folder
# ```
#
# `my_tasks/train.jsonl` and `my_tasks/test.jsonl` hold rows such as
# `{"question": "Which image shows the taller tower?", "images": ["a.jpg", "b.jpg"], "answer": "Image 2"}`.
