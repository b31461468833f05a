"""Skills of the base of the tool worlds on the held-out split: how often greedy decoding says just what the corpus says.

Every trained piece of a response is one trial: all of its tokens are the likeliest after the text before them. That is what
greedy decoding from there would say. Answers that are chance in the corpus are not counted.
"""

from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from imagent_jax.model import checkpoint
from imagent_jax.model.processor import Processor
from imagent_jax.model.vlm import at_tokens, encode_images, response_logprobs
from imagent_jax.tiny.build import BLOCK, TOOL_SHAPES, Shape, collate, encode_group
from imagent_jax.tiny.corpus import PretrainGroup, Segment
from imagent_jax.tiny.corpus_told import READ
from imagent_jax.tiny.corpus_tools import FORMS, make_group

COLD = 1e-4
"""Temperature at which the likeliest token has all of the probability."""
FIRST_WORDS = {
    "What is wrong": "see what is wrong", "What mark": "read a mark", "What does": "read", "Where is": "locate",
    "Show Image": "program on command", "Repair Image": "repair on command", "Search for": "search on command",
    "Look at": "look on command", "Look closely": "crop on command",
}  # fmt: skip
"""Skill of the first piece of a response, by how its question begins."""


def skills_of(response: list[Segment]) -> list[str | None]:
    """Return the skill that each trained piece of a response shows; None: it is chance."""
    question = response[0].text
    first = next((skill for words, skill in FIRST_WORDS.items() if question.startswith(words)), None)
    first = (f"{'copy' if 'Name the' in question else 'read or reckon'} what is told") if READ in question else first
    trained = [segment.text for segment in response if segment.trained]
    called, said = False, []
    for i, text in enumerate(trained):
        if "<tool_call>" in text:
            said.append("search again" if first == "search on command" and called else first)
            called = True
        elif first and called and i == len(trained) - 1 and "<answer>" in text:
            said.append(f"answer after: {first}")
        elif first and called:
            said.append(f"read after: {first}" if "Image" in text else None)
        else:
            said.append(first)
    return said


def measure(folder: Path, groups: int = 24, seed: int = 0, forms=FORMS) -> dict[str, float]:
    """Return the share of right pieces by skill, from `groups` groups of each form."""
    model, params = checkpoint.load(folder, vision_block=BLOCK)
    processor, rng, results = Processor.from_pretrained(folder), np.random.default_rng(seed), defaultdict(list)

    @jax.jit
    def logprobs(batch, pack):
        features = encode_images(model, params, *pack)
        shown = at_tokens(features, batch["prompt_vision"]), at_tokens(features, batch["response_vision"])
        arrays = {k: v for k, v in batch.items() if k != "trained"}
        return response_logprobs(model, params, shown=shown, temperature=COLD, **arrays)[0]

    for form in forms:
        shape = TOOL_SHAPES[form][-1]
        for _ in range(-(-groups // shape.groups)):
            drawn = [_fitting(rng, form, shape, processor) for _ in range(shape.groups)]
            batch, pack = collate([encoded for _, encoded in drawn], shape, processor.merge_size)
            likely = np.asarray(logprobs(batch, pack)) > np.log(0.5)
            for n, (group, (_, responses)) in enumerate(drawn):
                _count(results, group, responses, likely[n])
    return {skill: round(float(np.mean(oks)), 3) for skill, oks in sorted(results.items())}


def _fitting(rng: np.random.Generator, form: str, shape: Shape, processor: Processor):
    """Draw a group of the held-out split that a batch shape holds; return it and its tokens."""
    while True:
        group = make_group(rng, shape.size, form, "test")
        prompt, responses = encoded = encode_group(group, processor)
        longest = max(sum(len(one.ids) for one, _ in response) for response in responses)
        if len(prompt.ids) <= shape.prompt and longest <= shape.width:
            return group, encoded


def _count(results, group: PretrainGroup, responses, likely: np.ndarray) -> None:
    for j, (response, encoded) in enumerate(zip(group.responses, responses, strict=True)):
        skills, at = iter(skills_of(response)), 0
        for one, trained in encoded:
            end = at + len(one.ids)
            if trained and (skill := next(skills)):
                results[skill].append(bool(likely[j, at:end].all()))
            at = end
