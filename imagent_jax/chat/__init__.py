"""Chat formats: the only room that knows markup. Each renders tasks and observations, and parses turns."""

from imagent_jax.chat.answers import ANSWER_CLOSE, ANSWER_OPEN, answer_markup, extract_answer, well_formed_answer
from imagent_jax.chat.qwen import QWEN, Action, Answer, Call, MalformedCall, QwenChat, Text

__all__ = [
    "ANSWER_CLOSE",
    "ANSWER_OPEN",
    "QWEN",
    "Action",
    "Answer",
    "Call",
    "MalformedCall",
    "QwenChat",
    "Text",
    "answer_markup",
    "extract_answer",
    "well_formed_answer",
]
