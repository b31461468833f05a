"""Attention by source during generation: `python -m imagent_jax.attention RUN_OR_BASE [--tasks N] [--out F.png]`.

Held-out tasks are answered under four conditions: with and without tools, and with all images or only the one that the
question names. The attention of every generated token is divided over the sources of preceding tokens, as a mean over heads,
layers and rollouts. The measure follows Figure 1 of IMAgent (arXiv 2512.08980): attention to images decays with output
length, and showing an image again restores it.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from imagent_jax.chat import QWEN
from imagent_jax.model.vlm import attention_by_source
from imagent_jax.rl.mask import IS_ACTION
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.policy import Policy
from imagent_jax.runs.loading import load_policy
from imagent_jax.tools import ToolSet
from imagent_jax.types import Task

SOURCES = ("instructions", "question", "given images", "observation images", "observation text", "earlier output")
ROWS = 8  # sequences per measurement


def sources_of(rollout: RolloutBatch, n: int, g: int, user: int) -> np.ndarray:
    """Return the index in `SOURCES` of every token of rollout `g` of task `n`, prompt and response.

    Args:
        user: index of the prompt token at which the user's turn begins.
    """
    prompt, t = rollout.prompts[n], rollout.trajectories[n][g]
    given = np.where(rollout.prompt_vision[n] >= 0, 2, np.where(np.arange(len(prompt.ids)) < user, 0, 1))
    return np.concatenate([given, np.where(IS_ACTION[t.kind], 5, np.where(t.vision >= 0, 3, 4))])


def shares_of(model, params, rollout: RolloutBatch, width: int, user: Sequence[int]) -> list[np.ndarray]:
    """Return the attention shares of every generated token by trajectory, mean over layers: a list of float32 [t, C].

    Args:
        width: maximum tokens of a prompt and its response.
        user: index, per prompt, of the token at which the user's turn (images and question) begins.
    """
    measure, found = jax.jit(attention_by_source, static_argnums=0), []
    rows = [(n, g) for n, group in enumerate(rollout.trajectories) for g in range(len(group))]
    for begin in range(0, len(rows), ROWS):
        ids, vision = np.zeros((ROWS, width), np.int32), np.full((ROWS, width), -1, np.int32)
        positions, length = np.zeros((3, ROWS, width), np.int32), np.ones(ROWS, np.int32)
        source = np.zeros((ROWS, width, len(SOURCES)), bool)
        for i, (n, g) in enumerate(part := rows[begin : begin + ROWS]):
            prompt, t = rollout.prompts[n], rollout.trajectories[n][g]
            s = length[i] = len(prompt.ids) + len(t.ids)
            ids[i, :s] = np.concatenate([prompt.ids, t.ids])
            positions[:, i, :s] = np.concatenate([prompt.positions, t.positions], axis=1)
            vision[i, :s] = np.concatenate([rollout.prompt_vision[n], t.vision])
            source[i, np.arange(s), sources_of(rollout, n, g, user[n])] = True
        shares = measure(model, params, ids, positions, vision, length, rollout.store.show(vision), source)
        shares = np.asarray(shares.mean(0))
        for i, (n, g) in enumerate(part):
            prompt, t = len(rollout.prompts[n].ids), rollout.trajectories[n][g]
            found.append(shares[i, prompt : length[i]][IS_ACTION[t.kind]])
    return found


def about_one_image(task: Task) -> Task | None:
    """Return the same question with only the image that it names, as Image 1; None if it does not name exactly one, or
    images stand within its text."""
    named = set(re.findall(r"Image (\d+)", task.text))
    if task.parts or len(named) != 1 or not 1 <= (number := int(named.pop())) <= len(task.images):
        return None
    question, *options = (re.sub(r"Image \d+", "Image 1", text) for text in (task.question, *task.options))
    return replace(
        task, uid=f"{task.uid}, one image", question=question, options=tuple(options), images=(task.images[number - 1],)
    )


def measure(parts: Policy, tasks: Sequence[Task], tools: bool, seed: int) -> dict[str, Any]:
    """Measure one condition: sample rollouts of `tasks` and return attention shares by source, by position and by turn.

    Without tools, the system text lists none, calls are refused, and no image is shown again. Only positions reached by at
    least a tenth of the rollouts are included; `rollouts` holds how many reach each.
    """
    cfg = parts.cfg if tools else replace(parts.cfg, tools=replace(parts.cfg.tools, names=()))
    collector = Collector(parts.model, parts.processor, parts.tools if tools else ToolSet([]), cfg)
    rollout = collector.collect(
        parts.params, tasks, group_size=1, seed=seed, temperature=cfg.rollout.temperature, slots=min(len(tasks), cfg.eval.groups)
    )
    (start,) = parts.processor.encode(QWEN.turn_open)
    user = [np.flatnonzero(prompt.ids == start)[1] for prompt in rollout.prompts]
    width = cfg.rollout.prompt_tokens + cfg.rollout.response_tokens
    shares = shares_of(parts.model, parts.params, rollout, width, user)
    done = [t for group in rollout.trajectories for t in group]
    turns = [np.repeat(np.arange(len(t.turns)), [turn.stop - turn.start for turn in t.turns]) for t in done]
    reach = [sum(len(s) > i for s in shares) for i in range(max(map(len, shares)))]
    reach = [count for count in reach if count >= len(tasks) / 10]
    at = [np.mean([s[i] for s in shares if len(s) > i], axis=0) for i in range(len(reach))]
    of_turn = [[s[turn == k] for s, turn in zip(shares, turns, strict=True) if k in turn] for k in range(99)]
    of_turn = [found for found in of_turn if len(found) >= len(tasks) / 10]
    return {
        "calls": float(np.mean([t.executed_calls for t in done])),
        "all": {source: share for source, (share,) in _columns([np.concatenate(shares).mean(0)]).items()},
        "turn": _columns([np.concatenate(found).mean(0) for found in of_turn]) | {"rollouts": list(map(len, of_turn))},
        "position": _columns(at) | {"rollouts": reach},
    }


def _columns(rows: Sequence[np.ndarray]) -> dict[str, list[float]]:
    return dict(zip(SOURCES, np.stack(rows, axis=1).astype(float).round(5).tolist(), strict=True))


def plot(conditions: dict[str, Any], title: str, out: Path) -> None:
    """Plot one panel per condition: stacked shares by generated position, with the calls per task in the title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(conditions), figsize=(4.2 * len(conditions), 3.6), sharey=True, squeeze=False)
    colours = ("#c9ced6", "#8d99ae", "#2a9d8f", "#e76f51", "#f4c9a8", "#457b9d")
    for axis, (name, found) in zip(axes[0], conditions.items(), strict=True):
        axis.stackplot(
            range(len(found["position"]["rollouts"])),
            *(found["position"][source] for source in SOURCES),
            labels=SOURCES,
            colors=colours,
        )
        axis.set(title=f"{name}\n{found['calls']:.2f} calls a task", xlabel="generated token", ylim=(0, 1))
        axis.margins(x=0)
    axes[0][0].set_ylabel("share of attention")
    figure.suptitle(title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=len(SOURCES), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(prog="python -m imagent_jax.attention", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="RUN_OR_BASE", help="folder of a run, or 'tiny'")
    parser.add_argument("--tasks", type=int, default=64, help="held-out tasks that ask about one image (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--out", type=Path, default="attention.png", metavar="F.png", help="default: attention.png")
    parser.add_argument("--json", type=Path, metavar="F.json", help="default: beside the PNG")
    args = parser.parse_args(argv)
    console, out = Console(), args.json or args.out.with_suffix(".json")
    try:
        began, (parts, _) = time.perf_counter(), load_policy(args.model)
        pairs = [(task, one) for task in parts.test_tasks(20 * args.tasks) if (one := about_one_image(task))]
        if not pairs:
            raise ValueError(f"No held-out task of {parts.cfg.data.title} names one image, such as 'Image 2'.")
        several, one = map(list, zip(*pairs[: args.tasks], strict=True))
        console.print(f"Answers {len(one)} held-out tasks of {parts.cfg.data.title} with {args.model}, four times over.")
        found = {}
        for images, tasks in (("several images", several), ("one image", one)):
            for tools in (True, False):
                name = f"{images}, {'tools' if tools else 'no tools'}"
                with jax.set_mesh(parts.mesh):
                    found[name] = measure(parts, tasks, tools, args.seed)
                shares = [f"{100 * found[name]['all'][source]:.1f} % to {source}" for source in SOURCES[2:4]]
                console.print(f"{name}: {', '.join(shares)}")
        record = {
            "command": " ".join(["python -m imagent_jax.attention", *(sys.argv[1:] if argv is None else argv)]),
            "tasks": len(one),
            "conditions": found,
        }
        out.write_text(json.dumps(record, indent=1))
        plot(found, f"{args.model}: where attention goes as it writes", args.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"Wrote {args.out} and {out} ({time.perf_counter() - began:.0f} s).")
    return 0
