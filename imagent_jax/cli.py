"""The command `imagent COMMAND ...`, the same as `python -m imagent_jax.COMMAND ...`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train an agent (the main job)",
    "evaluate": "evaluate a model on held-out tasks or benchmarks, beside controls",
    "score": "score predictions of MAT and text benchmarks",
    "compare": "compare two results on the same questions",
    "data": "say what is in a data set, and which rows cannot be used; convert it to ArrayRecord",
    "curate": "make a data set of questions about several images, by agents and filters",
    "index": "build a search index of passages, or serve one",
    "view": "open a run's trajectories and report in the browser",
    "export": "write a training checkpoint as a Hugging Face model",
    "prompt": "print what the policy reads of a task",
    "plan": "say whether a run fits its chips, without them",
    "attention": "measure where an agent's attention goes",
    "ablate": "train ablations and compare them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: exit code of the command; 2 after the list of commands where there is no such command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"imagent_jax.{argv[0]}").main(argv[1:])
    asked = argv[:1] in (["--help"], ["-h"])
    lines = [] if asked or not argv else [f"error: there is no command {argv[0]!r}."]
    lines += ["usage: imagent COMMAND ...", *(f"  {name:<10} {what}" for name, what in COMMANDS.items())]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
