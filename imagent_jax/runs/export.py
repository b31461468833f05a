"""A training checkpoint as a Hugging Face model: `python -m imagent_jax.export RUN OUT [--step N]`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from rich.console import Console

from imagent_jax.config import load_config
from imagent_jax.model import checkpoint, lora
from imagent_jax.model.vlm import Model
from imagent_jax.runs.loading import load_policy


def trained_params(run: Path, step: int | None) -> tuple[Path, Model, nnx.State, int | None]:
    """Return the base model's folder, the trained model with adapters merged, its parameters, and the checkpoint's step."""
    policy, step = load_policy(run, step=step)
    return policy.folder, *lora.merge(policy.model, policy.params), step


def export(
    run: Path, out: Path, console: Console, *, step: int | None = None, dtype: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Write the model of a run's checkpoint to `out`: weights, config, tokenizer, processor and generation config.

    Args:
        step: step of the checkpoint; default: the newest.
        dtype: dtype of the weights; default: as trained.
    Raises:
        ValueError: no such run or checkpoint, the base model is not available, or `out` is not an empty or new folder.
    """
    began = time.perf_counter()
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run, it holds no config.yaml; name a folder such as runs/tiny.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and is not an empty folder; name a new one.")
    cfg = load_config(run / "config.yaml")
    console.print(f"Exports {'the newest checkpoint' if step is None else f'checkpoint {step}'} of {run} ({cfg.model.path}).")
    console.print(f"Writes to {out}: weights, config, tokenizer, processor and generation config, as Hugging Face names them.")
    with console.status("Loading the base and the checkpoint"):
        base, model, params, step = trained_params(run, step)
    with console.status("Writing the weights"):
        checkpoint.save(out, model, params, source=base, dtype=dtype, max_shard_size=max_shard_size)
    files = sorted(path for path in out.iterdir())
    weights = [path for path in files if path.suffix == ".safetensors"]
    console.print(
        f"Wrote step {step}: {sum(path.stat().st_size for path in weights) / 1e9:.3f} GB in {len(weights)} weight file(s), "
        f"{len(files) - len(weights)} others, {dtype or cfg.model.param_dtype}, {time.perf_counter() - began:.0f} s."
    )
    console.print(f'Load it: AutoModelForImageTextToText.from_pretrained("{out}"), or --model.path {out}', soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(prog="python -m imagent_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/tiny")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder of the model")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as trained)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="most bytes of a weight file (default: 5GB)")
    args = vars(parser.parse_args(argv))
    try:
        export(args.pop("run"), args.pop("out"), Console(), **args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
