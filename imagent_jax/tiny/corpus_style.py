"""How the corpus of the tool worlds shows images, offers tools and runs calls.

Its tools have the schemas of the run's own. `python` runs the corpus' own programs in this process, as the sandbox would;
`search` looks into a few articles of a group.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from imagent_jax.chat import QWEN, Call
from imagent_jax.tiny.corpus import PROMPT, Segment, Style, observation
from imagent_jax.tiny.encyclopaedia import Article
from imagent_jax.tiny.prints import applied, steps_of
from imagent_jax.tools import VISUAL_TOOLS, ImageRegistry, Tool, ToolContext, ToolSet, ToolSettings, tool
from imagent_jax.types import ImageNumber

GIVEN = (3136, 7056)
"""Pixel budget of given images: a print has 84 x 84 pixels, and its tag can be read."""
SETTINGS = ToolSettings(high_pixels=168 * 168)
LOOK = ("visual_reflection", "visual_confirmation")
TOOLSETS = {"look": LOOK, "code": (*LOOK, "python"), "search": (*LOOK, "search"), "all": (*LOOK, "python", "search")}
"""Tools that prompts of the corpus offer: those of the runs."""
PASSAGES = 2
"""Passages that a search shows."""


def style_of(key: str, articles: Sequence[Article] = ()) -> Style:
    """Return the style of prompts that offer `TOOLSETS[key]`; a search looks into `articles`."""
    own = {"python": python, "search": search_in(articles)}
    return Style(GIVEN, SETTINGS, ToolSet([VISUAL_TOOLS.get(name) or own[name] for name in TOOLSETS[key]]))


@tool
def python(context: ToolContext, code: str) -> list[str | ImageNumber]:
    """Run a program of `prints.program`.

    Args:
        code: the program
    """
    number, steps = steps_of(code)
    return [context.show(applied(context.registry[number].pixels, steps), parent=number, origin="python")]


def search_in(articles: Sequence[Article]) -> Tool:
    """Return the tool `search` over a few articles: the sum over the query's words of rarity times saturated frequency."""
    counts = [Counter(_words(f"{article.title} {article.text}")) for article in articles]

    @tool
    def search(context: ToolContext, query: str) -> list[str]:
        """Find articles.

        Args:
            query: words
        """
        scores = [0.0] * len(articles)
        for word in _words(query):
            having = sum(word in count for count in counts)
            for i, count in enumerate(counts):
                scores[i] += math.log(1 + len(articles) / max(having, 1)) * count[word] / (count[word] + 1)
        best = sorted(range(len(articles)), key=lambda i: (-scores[i], articles[i].id))[:PASSAGES]
        shown = [PROMPT.passage.replace("{text}", articles[i].text) for i in best if scores[i]]
        return shown or ["No passages were found."]

    return search


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def make_call(style: Style, registry: ImageRegistry, said: str, name: str, arguments: dict) -> tuple[list[Segment], list]:
    """Return a turn that says something and calls a tool, with what the call shows; and the parts of the observation. Images are
    added to the registry."""
    result = style.tools.execute(Call(name, arguments), registry, style.settings)
    assert result.error is None, result.error
    return [Segment(said + QWEN.render_call(name, arguments), True), observation(result.parts, registry)], result.parts
