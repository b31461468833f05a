"""The chat format of Qwen2-VL and Qwen2.5-VL: ChatML turns, tool calls as Qwen2.5's template writes them.

A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Text of a model is read by `json.loads` alone.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from imagent_jax.chat.answers import ANSWER_CLOSE, ANSWER_OPEN, extract_answer
from imagent_jax.types import Markup, ToolError, quote

_TOOLS_TEXT = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALL_TEXT = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class Call(NamedTuple):
    """A well-formed call: the name of a tool, and arguments."""

    name: str
    arguments: dict[str, Any]


class MalformedCall(NamedTuple):
    """A turn that makes a call which cannot be read. `error` says what to repair."""

    error: str


class Answer(NamedTuple):
    """A turn that answers."""

    text: str


class Text(NamedTuple):
    """A turn that neither calls nor answers."""

    text: str


Action = Call | MalformedCall | Answer | Text
"""What a turn does."""


class QwenChat:
    """Renders and parses turns. Rendering gives a list of parts: images, which are any objects, and text.

    Text is a tuple of texts that are tokenised as one. What the template and the settings say is `Markup`. Text of questions,
    tools and schemas is plain, so that a marker in it opens and ends nothing. Consecutive tuples are tokenised apart from each
    other. So a list of images has the same tokens whatever question follows it.
    """

    turn_open, turn_close, end_of_text = map(Markup, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    call_open, call_close = "<tool_call>", "</tool_call>"
    response_open, response_close = "<tool_response>", "</tool_response>"
    stop_strings = (turn_close, end_of_text, call_close)

    # ---- rendering ----------------------------------------------------------------------------------------------------

    def begin_turn(self, role: str) -> Markup:
        """Return what stands before a turn of "system", "user" or "assistant"."""
        return Markup(f"{self.turn_open}{role}\n")

    def next_turn(self, role: str, closed: bool = False) -> Markup:
        """Return what stands between two turns, the second of them of `role`. `closed`: the first has written its own end."""
        return Markup(f"{'' if closed else self.turn_close}\n{self.begin_turn(role)}")

    def system(self, text: str, schemas: Sequence[dict[str, Any]] = ()) -> tuple[str, ...]:
        """Return the content of a system turn: `text` and the schemas of tools, as Qwen2.5's chat template writes them."""
        if not schemas:
            return (Markup(text),)
        lines = ("\n" + json.dumps(schema, ensure_ascii=False) for schema in schemas)
        return Markup(text + _TOOLS_TEXT), *lines, Markup(_CALL_TEXT)

    def render_parts(self, system: Sequence[str], shown: Sequence[str | int], images: Sequence[Any]) -> list[Any]:
        """Return the parts of a prompt without its last marker: the system turn, then texts and images.

        Every text begins a line. A line "Image 3:" stands before every image.

        Args:
            system: see `system`.
            shown: see `Task.shown`.
            images: all images; `shown` has their numbers.
        """
        parts, text, between = [], (self.begin_turn("system"), *system, self.next_turn("user")), ()
        for part in shown:
            if isinstance(part, str):
                if not between:  # tokenised apart from what precedes it
                    parts, text = [*parts, text], ()
                text, between = (*text, *between, part), ("\n",)
            else:
                parts += [(*text, *between, f"Image {part}: "), images[part - 1]]
                text, between = ("\n",), ()
        return [*parts, text]

    def render_task(self, system: Sequence[str], shown: Sequence[str | int], images: Sequence[Any]) -> list[Any]:
        """Return the parts of a prompt: system turn, question with its images, and the beginning of the first answer.

        The arguments are those of `render_parts`.
        """
        *parts, text = self.render_parts(system, shown, images)
        return [*parts, (*text, self.next_turn("assistant"))]

    def render_observation(self, parts: Sequence[Any], closed: bool = False) -> list[Any]:
        """Return the parts of a tool response, lines of text and images in their order, and of the beginning of a new turn.

        No line can close the response: where the vocabulary has no token for it, "</tool_response>" would be the same tokens
        in a line as in the template, and becomes "< /tool_response>". A lone surrogate, which a policy can write, becomes "?".

        Args:
            closed: the turn before has written its own end.
        """
        out, text = [], (self.next_turn("user", closed), Markup(f"{self.response_open}\n"))
        for part in parts:
            if isinstance(part, str):
                line = part.encode("utf-8", "replace").decode()
                text = *text, re.sub("<(?=/?tool_response>)", "< ", line), "\n"
            else:
                out += [text, part]
                text = ("\n",)
        return [*out, (*text, Markup(self.response_close), self.next_turn("assistant"))]

    def render_call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a call as Qwen2.5's chat template writes it."""
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"{self.call_open}\n{body}\n{self.call_close}"

    # ---- parsing ------------------------------------------------------------------------------------------------------

    def makes_call(self, text: str) -> bool:
        """Return whether a turn makes a call, well-formed or not."""
        return self.call_open in text

    def is_complete(self, text: str) -> bool:
        """Return whether the call that a turn makes is closed, so that nothing of it was cut off."""
        return self.call_close in text.partition(self.call_open)[2]

    def parse(self, text: str) -> Action:
        """Return what a turn does. A call goes before an answer; text around either is ignored."""
        if self.makes_call(text):
            try:
                return self.parse_call(text)
            except ToolError as error:
                return MalformedCall(str(error))
        answer = extract_answer(text)
        return Text(text) if answer is None else Answer(answer)

    def without_end(self, text: str) -> str:
        """Return the text of a turn without the marks that end it."""
        return text.removesuffix(self.turn_close).removesuffix(self.end_of_text)

    def action_span(self, text: str) -> tuple[str, str | None] | None:
        """Return the markers between which a turn acts: (call, None: to its end), an answer's two markers, or None."""
        if self.makes_call(text):
            return self.call_open, None
        return (ANSWER_OPEN, ANSWER_CLOSE) if ANSWER_OPEN in text and ANSWER_CLOSE in text else None

    def parse_call(self, text: str) -> Call:
        """Read the one call in a turn's text. Text around it is ignored.

        Raises:
            ToolError: there is no call or more than one, it is not closed, or it is not strict JSON (finite numbers, no repeated
                keys) of the form {"name": text, "arguments": object}. The message says what to repair.
        """
        opened, closed = text.count(self.call_open), text.count(self.call_close)
        if opened == 0:
            raise ToolError("there is no tool call" if closed == 0 else "the tool call is not opened")
        if opened > 1 or closed > 1:
            raise ToolError("make one tool call at a time")
        body = text.partition(self.call_open)[2]
        if closed == 0 or self.call_close not in body:
            raise ToolError("the tool call is not closed")
        call = _load_json(body.partition(self.call_close)[0])
        if not isinstance(call, dict):
            raise ToolError('the tool call must be an object {"name": ..., "arguments": {...}}')
        for key in call:
            if key not in ("name", "arguments"):
                raise ToolError(f'the tool call has an unexpected key {quote(key)}; it takes "name" and "arguments"')
        if not isinstance(call.get("name"), str):
            raise ToolError('the tool call needs "name": the name of a tool')
        if not isinstance(call.get("arguments"), dict):
            raise ToolError('the tool call needs "arguments": an object')
        return Call(call["name"], call["arguments"])


QWEN = QwenChat()


def _load_json(text: str) -> Any:
    """Load JSON, refusing everything beyond it; ToolError with the place of the mistake."""

    def refuse_constant(word: str) -> None:
        raise ToolError(f"bad JSON: {word} is not a JSON number")

    def finite(word: str) -> float:
        if math.isinf(number := float(word)):
            raise ToolError(f"bad JSON: the number {quote(word)} is too large")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ToolError(f"bad JSON: {quote(key)} is given twice")
            result[key] = value
        return result

    try:
        return json.loads(text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ToolError(f"bad JSON at character {error.pos} of the call: {error.msg}") from error
    except RecursionError as error:
        raise ToolError("bad JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ToolError("bad JSON: a number is too long") from error
