"""One trajectory in progress: its exact tokens turn by turn, and when it ends."""

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from imagent_jax.chat import Answer, Call, MalformedCall, QwenChat, Text, extract_answer
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model.interleave import Encoded, encode_parts
from imagent_jax.model.processor import Processor
from imagent_jax.rollout.environment import ToolEnvironment, answered
from imagent_jax.types import CallResult, CallStatus, EndReason, ImageEntry, Task, TokenKind, Trajectory, Turn


class Rules(NamedTuple):
    """What all episodes of a run share: how text becomes tokens, and when an episode ends.

    Attributes:
        response_tokens: most tokens after the prompt.
        max_turns: most calls.
        max_repeats: how often the same call may be made.
        timeout_s: seconds that a method of an environment may take.
    """

    chat: QwenChat
    processor: Processor
    response_tokens: int
    max_turns: int
    max_repeats: int
    timeout_s: float

    def ask(self, environment: ToolEnvironment, work: Callable[[], Any]) -> Any:
        """Return what `work` asks of an environment. Environments of this package wait for nothing and have no time limit.

        Raises:
            TimeoutError: it took longer than `timeout_s` seconds. What the environment raises is raised.
        """
        own = type(environment).__module__.startswith("imagent_jax.")
        return work() if own else answered(work, self.timeout_s)

    def prepare(self, environment: ToolEnvironment, entry: ImageEntry, observed: bool) -> PreparedImage:
        """Return an image in the size at which the policy sees it. `observed`: a call shows it."""
        return self.processor.prepare_to(environment.view(entry, observed), entry.shown)


class Episode:
    """One trajectory in progress. `end` is None until it has ended.

    Args:
        position: the M-RoPE position after the prompt.
        error: what the environment raised before the first turn, which then ends the trajectory with a FAULT.
    """

    def __init__(
        self, rules: Rules, task: Task, rollout: int, environment: ToolEnvironment, position: int, error: str | None = None
    ):
        self.rules, self.task, self.rollout, self.environment = rules, task, rollout, environment
        self.turns: list[Turn] = []
        self.kinds: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.vision: list[np.ndarray] = []
        self.length, self.position = 0, position
        self.closed = False  # the last turn has written its own end
        self.executed: dict[str, int] = {}  # how often each call was executed
        self.end: EndReason | None = None
        self.error = error

    def end_turn(self, ids: np.ndarray) -> Call | MalformedCall | None:
        """Add the sampled tokens of a turn. Returns the call that it makes; None where the episode ended with it."""
        chat, text = self.rules.chat, self.rules.processor.decode(ids)
        self.turns.append(Turn(self.length, self.length + len(ids), text))
        self.closed = ids[-1:].tolist() == self.rules.processor.encode(chat.turn_close)
        positions = np.tile(self.position + np.arange(len(ids), dtype=np.int32), (3, 1))
        kinds = token_kinds(ids, text, self.rules.processor, chat)
        self._add(kinds, positions, np.full(len(ids), -1, np.int32), self.position + len(ids))
        if self.error is not None:
            return self._finish(EndReason.FAULT)
        full = self.length >= self.rules.response_tokens
        action = chat.parse(text)
        if isinstance(action, (Answer, Text)):
            void = EndReason.TRUNCATED if full else EndReason.VOID
            return self._finish(EndReason.ANSWERED if isinstance(action, Answer) else void)
        if full and not chat.is_complete(text):
            return self._finish(EndReason.TRUNCATED)
        if sum(turn.call is not None for turn in self.turns) >= self.rules.max_turns:
            return self._finish(EndReason.OVER_TURNS)
        return action

    def respond(self, result: CallResult, images: list[PreparedImage]) -> Encoded | None:
        """Take the result of a call and the images that it shows, prepared. Returns the observation; None where the episode
        ended with it.

        Raises:
            ValueError: placeholders and features do not match (promise 5; the task is named).
        """
        self.turns[-1].call = result
        if result.status == CallStatus.FAULT:
            self.error = result.error
            return self._finish(EndReason.FAULT)
        if result.ends:
            return self._finish(EndReason.VOID)
        if result.status == CallStatus.INVALID:
            kinds = self.kinds[-1]
            kinds[kinds == TokenKind.TOOL_CALL] = TokenKind.INVALID_CALL
        else:
            key = f"{result.name} {result.arguments}"
            self.executed[key] = self.executed.get(key, 0) + 1
            if self.executed[key] > self.rules.max_repeats:
                return self._finish(EndReason.REPEATED)
        shown = iter(images)
        parts = [part if isinstance(part, str) else next(shown) for part in result.parts]
        parts = self.rules.chat.render_observation(parts, self.closed)
        try:
            encoded = encode_parts(parts, self.rules.processor, self.position)
        except ValueError as error:
            raise ValueError(f"Task {self.task.uid}: {error}") from error
        if self.length + len(encoded.ids) >= self.rules.response_tokens:
            return self._finish(EndReason.TRUNCATED)  # no room to say anything about it
        return encoded

    def observe(self, encoded: Encoded, vision: np.ndarray) -> None:
        """Add an observation, once it is appended; `vision` has the feature row of every token (int32 [S])."""
        kinds = np.full(len(encoded.ids), TokenKind.OBSERVATION, np.uint8)
        self._add(kinds, encoded.positions, vision, encoded.next_position)

    def trajectory(self, ids: np.ndarray, logprobs: np.ndarray) -> Trajectory:
        """Return the finished trajectory, given its row of the engine's buffers ([R] each). Its task and arrays are its own."""
        kinds, environment = np.concatenate(self.kinds), self.environment
        try:
            images = self.rules.ask(environment, lambda: environment.images)
        except Exception:  # noqa: BLE001 - of an environment of the user's
            images = tuple(getattr(environment, "_registry", ()))
            self.end, self.error = EndReason.FAULT, self.error or traceback.format_exc()
        made = Trajectory(
            task=replace(self.task),
            rollout=self.rollout,
            ids=ids[: self.length].copy(),
            logprobs=np.where(kinds == TokenKind.OBSERVATION, 0.0, logprobs[: self.length]).astype(np.float32),
            kind=kinds,
            positions=np.concatenate(self.positions, axis=1),
            vision=np.concatenate(self.vision),
            turns=self.turns,
            end=EndReason(self.end),  # fails before the end
            answer=extract_answer(self.turns[-1].text) if self.end == EndReason.ANSWERED else None,
            images=images,
            error=self.error,
        )
        try:
            made.environment_reward = self.rules.ask(environment, lambda: environment.reward(made))
        except Exception:  # noqa: BLE001 - of an environment of the user's
            made.end, made.error = EndReason.FAULT, made.error or traceback.format_exc()
        for array in (made.ids, made.logprobs, made.kind, made.positions, made.vision):
            array.setflags(write=False)  # what trains is what was sampled, whatever a reward does
        return made

    def _add(self, kinds: np.ndarray, positions: np.ndarray, vision: np.ndarray, position: int) -> None:
        self.kinds.append(kinds)
        self.positions.append(positions)
        self.vision.append(vision)
        self.length, self.position = self.length + len(kinds), position

    def _finish(self, end: EndReason) -> None:
        self.end = end
        try:
            answered(self.environment.close, self.rules.timeout_s)
        except Exception:  # noqa: BLE001 - of an environment of the user's
            self.end, self.error = EndReason.FAULT, self.error or traceback.format_exc()


def token_kinds(ids: np.ndarray, text: str, processor: Processor, chat: QwenChat) -> np.ndarray:
    """Return the kind of every sampled token of a turn: TOOL_CALL from the call on, ANSWER for the answer, else TEXT."""
    kinds = np.full(len(ids), TokenKind.TEXT, np.uint8)
    if (span := chat.action_span(text)) is None:
        return kinds
    first, last = span
    begin = _token_of(ids, first, processor)
    if last is None:
        kinds[begin:] = TokenKind.TOOL_CALL
    else:
        kinds[begin : _token_of(ids, last, processor, end=True) + 1] = TokenKind.ANSWER
    return kinds


def _token_of(ids: np.ndarray, marker: str, processor: Processor, end: bool = False) -> int:
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
