"""What one rollout has come to so far, turn by turn, and what the text of a turn says."""

import re
from dataclasses import dataclass, field

import numpy as np

from imagent_jax.model.interleave import Encoded
from imagent_jax.model.processor import Processor
from imagent_jax.tools import ImageRegistry
from imagent_jax.types import EndReason, Task, TokenKind, Trajectory, Turn

TURN_END = "<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


@dataclass
class Row:
    """Host-side record of one rollout in progress."""

    task: Task
    rollout: int
    registry: ImageRegistry
    turns: list[Turn] = field(default_factory=list)
    kinds: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    vision: list[np.ndarray] = field(default_factory=list)
    seen: int = 0  # tokens of the response already accounted for
    position: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    end: EndReason | None = None
    error: str | None = None

    def book_observation(self, encoded: Encoded, vision: np.ndarray) -> None:
        """Adds what a call showed, its images' feature rows being `vision` (int32 [S])."""
        self.kinds.append(np.full(len(encoded.ids), TokenKind.OBSERVATION, np.uint8))
        self.positions.append(encoded.positions)
        self.vision.append(vision)
        self.seen, self.position = self.seen + len(encoded.ids), encoded.next_position

    def trajectory(self, ids: np.ndarray, logprobs: np.ndarray) -> Trajectory:
        """The finished rollout, from its buffers on the device ([R] each)."""
        kinds = np.concatenate(self.kinds)
        return Trajectory(
            task=self.task,
            rollout=self.rollout,
            ids=ids[: self.seen].copy(),
            logprobs=np.where(kinds == TokenKind.OBSERVATION, 0.0, logprobs[: self.seen]).astype(np.float32),
            kind=kinds,
            positions=np.concatenate(self.positions, axis=1),
            vision=np.concatenate(self.vision),
            turns=self.turns,
            end=self.end,
            answer=extract_answer(self.turns[-1].text) if self.end == EndReason.ANSWERED else None,
            registry=self.registry,
            error=self.error,
        )


def token_kinds(ids: np.ndarray, text: str, processor: Processor) -> np.ndarray:
    """The kind of every sampled token of a turn: from `<tool_call>` on TOOL_CALL, the `<answer>` span ANSWER, else TEXT."""
    kinds = np.full(len(ids), TokenKind.TEXT, np.uint8)
    if "<tool_call>" in text:
        kinds[_first_token(ids, "<tool_call>", processor) :] = TokenKind.TOOL_CALL
    elif "<answer>" in text and "</answer>" in text:
        end = _first_token(ids, "</answer>", processor, end=True)
        kinds[_first_token(ids, "<answer>", processor) : end + 1] = TokenKind.ANSWER
    return kinds


def _first_token(ids: np.ndarray, marker: str, processor: Processor, end: bool = False) -> int:
    """Index of the token with which `marker` begins (or ends) in the decoded text."""
    low, high = 0, len(ids) - 1  # smallest prefix whose text holds the marker: its last token completes the marker
    while low < high:
        middle = (low + high) // 2
        if marker in processor.decode(ids[: middle + 1]):
            high = middle
        else:
            low = middle + 1
    if end:
        return low
    first = low
    while first > 0 and marker not in processor.decode(ids[first : low + 1]):
        first -= 1
    return first


def extract_answer(text: str) -> str | None:
    """What stands in the last `<answer>…</answer>` of a turn; None where there is none."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else None
