"""Print the prompt of a task as the policy reads it: `imagent prompt [--task N] [--split train|test] [--config FILE ...]`.

The tokenizer is needed, the weights are not.
"""

import argparse
import sys
from collections.abc import Sequence

from imagent_jax.config import Config, parse_args
from imagent_jax.data.pipeline import SPLITS, check_source, open_tasks
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model import checkpoint
from imagent_jax.model.families import read_folder
from imagent_jax.model.processor import Processor
from imagent_jax.model.vlm import abstract
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.policy import check_images, tools_of
from imagent_jax.types import Task


def collector_without_weights(cfg: Config) -> Collector:
    """Return what opens tasks for a configuration; it cannot roll out.

    Raises:
        ValueError: invalid settings or files.
    """
    folder = checkpoint.resolve(cfg.model.path, weights=False)
    size = read_folder(folder)
    check_images(cfg, size.vision)
    return Collector(abstract(size)[0], Processor.from_pretrained(folder), tools_of(cfg), cfg)


def written(collector: Collector, task: Task) -> str:
    """Return the prompt of a task as text, with a line in brackets in place of each image, and how long it is.

    Raises:
        ValueError: the environment failed, or see `Collector.open_task`.
    """
    opened = collector.open_task(task)
    if opened.error:
        raise ValueError(f"Task {task.uid}: its environment failed ({opened.error.strip().splitlines()[-1]}).")
    pieces = []
    for part in collector.parts(task, opened.prompt.images):
        if isinstance(part, PreparedImage):
            tokens = part.grid[0] * part.grid[1] // collector.processor.merge_size**2
            pieces.append(f"[an image of {part.size[1]} x {part.size[0]} pixels: {tokens} tokens]")
        else:
            pieces.append("".join(part))
    room = collector.cfg.rollout.prompt_tokens
    return f"{''.join(pieces)}\n\n{task.uid}: {len(opened.prompt.ids)} of {room} tokens (rollout.prompt_tokens)."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--task", type=int, default=0)
    options.add_argument("--split", choices=SPLITS, default="train")
    chosen, rest = options.parse_known_args(argv)
    cfg = parse_args(rest, program=f"imagent_jax.prompt [--task N] [--split {'|'.join(SPLITS)}]")
    try:
        check_source(cfg.data)
        collector = collector_without_weights(cfg)
        tasks = open_tasks(cfg.data, chosen.split)
        if not 0 <= chosen.task < len(tasks):
            raise ValueError(f"There is no task {chosen.task}; the split {chosen.split} has tasks 0 to {len(tasks) - 1}.")
        print(written(collector, tasks[chosen.task]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
