"""Prompts: the system text and the descriptions of tools, in YAML files that a user can copy and edit."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).parents[1]
SHIPPED = {"default": _PACKAGE / "chat" / "prompt.yaml", "tiny": _PACKAGE / "tiny" / "prompt.yaml"}
"""Prompts that the package holds: for real models, and the one that the tiny base was trained with."""


@dataclass(frozen=True)
class Prompt:
    """What the policy is told besides the task.

    Attributes:
        system: the system text.
        with_tools: follows it where the policy has tools.
        tools: texts of tools, by name, in place of those of their docstrings: `description` and, by name, `arguments`. Arguments
            that are not listed have no description. Of `search`, `passage` is the form of a passage that it found, with
            {number} (from 1), {title} and {text}.
    """

    system: str
    with_tools: str = ""
    tools: dict[str, dict[str, Any]] = field(default_factory=dict)

    def text(self, offers_tools: bool) -> str:
        """Return the system text."""
        return "\n\n".join(part for part in (self.system, self.with_tools if offers_tools else "") if part)

    @property
    def passage(self) -> str:
        """The form of a passage that `search` found; by default that of Search-R1."""
        return self.tools.get("search", {}).get("passage", "Doc {number}(Title: {title}) {text}")

    def described(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return a tool's schema (OpenAI's function form) with the texts of this prompt."""
        if (texts := self.tools.get(schema["function"]["name"])) is None:
            return schema
        schema = copy.deepcopy(schema)
        function = schema["function"]
        function["description"] = texts["description"]
        for name, argument in function["parameters"]["properties"].items():
            argument.pop("description", None)
            if words := (texts.get("arguments") or {}).get(name):
                argument["description"] = words
        return schema


def read_prompt(name: str) -> Prompt:
    """Read a prompt: "default", "tiny", or a YAML file with `system`, `with_tools` and `tools` (see `Prompt`).

    Raises:
        ValueError: there is no such file, or it is no prompt; the message says what is wrong in it.
    """
    path = SHIPPED.get(name) or Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no prompt {name!r}; name a YAML file, or one of {', '.join(SHIPPED)} (tools.prompt).")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompt {path} is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(found, dict) or not isinstance(found.get("system"), str) or set(found) - {"system", "with_tools", "tools"}:
        raise ValueError(f"The prompt {path} needs a text `system`, and may have a text `with_tools` and a mapping `tools`.")
    tools = found.get("tools") or {}
    if not isinstance(found.get("with_tools", ""), str) or not isinstance(tools, dict):
        raise ValueError(f"In the prompt {path}, `with_tools` is a text and `tools` maps names of tools to their texts.")
    for tool, texts in tools.items():
        arguments = texts.get("arguments") or {} if isinstance(texts, dict) else None
        told = [texts.get("description"), *arguments.values()] if isinstance(arguments, dict) else [None]
        if not all(isinstance(text, str) for text in told):
            raise ValueError(f"In the prompt {path}, {tool} needs a text `description`, and `arguments` maps names to texts.")
        form = texts.get("passage", "{text}")
        if not isinstance(form, str) or "{text}" not in form:
            raise ValueError(f"In the prompt {path}, `passage` of {tool} must be a text that has {{text}} in it.")
    return Prompt(found["system"].strip(), found.get("with_tools", "").strip(), tools)
