"""Experiment trackers: TensorBoard files always, Weights & Biases if `run.wandb` is set."""

import secrets
import time
from numbers import Real
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from imagent_jax.config import Config


class Trackers:
    """Passes every record of metrics.jsonl to the trackers. Records of a resumed run replace those of the same steps.

    Raises:
        ValueError: `run.wandb` is set and wandb is not installed.
    """

    def __init__(self, cfg: Config, folder: Path):
        self.folder, self.board, self.wandb = folder, None, None
        if cfg.run.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("run.wandb is set, but wandb is not installed; pip install wandb, or unset it.") from None
            kept = folder / "wandb_id"  # a resumed run continues the same W&B run
            if not kept.is_file():
                kept.write_text(secrets.token_hex(4))
            self.wandb = wandb.init(
                project=cfg.run.wandb, name=cfg.run.name, id=kept.read_text(), resume="allow", dir=folder, config=cfg.to_dict()
            )

    def log(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record at its `step`."""
        step, numbers = record["step"], {k: v for k, v in record.items() if isinstance(v, Real) and k != "step"}
        if self.board is None:  # written synchronously: the thread of the library's SummaryWriter hangs on a full disk
            (self.folder / "tensorboard").mkdir(exist_ok=True)
            self.board = EventsWriter(str(self.folder / "tensorboard" / "events"), f".{time.time_ns()}")
            _write(self.board, Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        _write(self.board, Event(step=step, summary=Summary(value=values)))
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        """End the run at Weights & Biases."""
        if self.wandb:
            self.wandb.finish()


def _write(board: EventsWriter, event: Event) -> None:
    event.wall_time = time.time()
    board.write_event(event)
    board.flush()
