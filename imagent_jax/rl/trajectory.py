"""What a rollout leaves behind, and the batch that training takes."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from imagent_jax.data.task import Task
from imagent_jax.tools import CallResult, CallStatus, ImageRegistry

AnyArray = jax.Array | np.ndarray


class TokenKind(IntEnum):
    """What a token of a response is. The first four are actions: the policy sampled them."""

    TEXT = 0
    TOOL_CALL = 1
    INVALID_CALL = 2
    ANSWER = 3
    OBSERVATION = 4
    PAD = 5


class EndReason(IntEnum):
    """Why a trajectory ended. FAULT: the world failed, not the policy."""

    ANSWERED = 0
    TRUNCATED = 1
    OVER_TURNS = 2
    VOID = 3
    REPEATED = 4
    FAULT = 5


@dataclass
class Turn:
    """One assistant turn: tokens [start, stop) of the response, their text, and the call it made."""

    start: int
    stop: int
    text: str
    call: CallResult | None = None


@dataclass
class Trajectory:
    """One finished rollout: the exact ids, append-only. r tokens.

    Attributes:
        ids int32[r]; logprobs float32[r], the sampler's (0 at observations); kind uint8[r], `TokenKind`;
        positions int32[3, r], M-RoPE; vision int32[r], feature row of image placeholders (-1: text).
    """

    task: Task
    rollout: int
    ids: np.ndarray
    logprobs: np.ndarray
    kind: np.ndarray
    positions: np.ndarray
    vision: np.ndarray
    turns: list[Turn]
    end: EndReason
    answer: str | None
    registry: ImageRegistry = field(repr=False, default_factory=ImageRegistry)
    error: str | None = None

    def _calls(self, status: CallStatus) -> int:
        return sum(turn.call is not None and turn.call.status == status for turn in self.turns)

    @property
    def executed_calls(self) -> int:
        return self._calls(CallStatus.EXECUTED)

    @property
    def invalid_calls(self) -> int:
        return self._calls(CallStatus.INVALID)

    @property
    def faulted_calls(self) -> int:
        return self._calls(CallStatus.FAULT)


@no_type_check  # as a tree it may hold anything in place of its arrays: shapes, shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupBatch:
    """The unit of training, arrays of NumPy or JAX. Responses are right-padded with kind PAD.

    N groups, G rollouts a group, P prompt tokens, R response tokens, F merged features.
    """

    prompt_ids: Int32[AnyArray, "N P"]
    prompt_positions: Int32[AnyArray, "3 N P"]
    prompt_len: Int32[AnyArray, " N"]
    prompt_vision: Int32[AnyArray, "N P"]  # feature row, -1 for text
    response_ids: Int32[AnyArray, "N G R"]
    response_positions: Int32[AnyArray, "3 N G R"]
    response_len: Int32[AnyArray, "N G"]
    response_vision: Int32[AnyArray, "N G R"]
    kind: UInt8[AnyArray, "N G R"]
    logprobs: Float32[AnyArray, "N G R"]  # the sampler's
    end: UInt8[AnyArray, "N G"]
    rewards: Float32[AnyArray, "N G"]
    advantages: Float32[AnyArray, "N G"]
    features: Float[AnyArray, "F D"] | None = None  # already encoded, for a frozen tower
