"""The corpus of the base of the tool worlds: forms of `corpus.py`, `corpus_code.py`, `corpus_search.py` and
`corpus_told.py`, by share.

The rule is that of `corpus.py`: no question is followed by a call that helps to answer it. `tests/test_tiny_corpus_tools.py`
checks it.
"""

import numpy as np

from imagent_jax.tiny import corpus, corpus_code
from imagent_jax.tiny.corpus import PretrainGroup
from imagent_jax.tiny.corpus_search import searches
from imagent_jax.tiny.corpus_style import style_of
from imagent_jax.tiny.corpus_told import told

FORMS = {
    "crop": 0.02, "thumbnail": 0.02, "crops": 0.09, "thumbnails": 0.07, "calls": 0.19, "told": 0.10,
    "print": 0.03, "page": 0.02, "prints": 0.10, "programs": 0.17, "pages": 0.04, "searches": 0.15,
}  # fmt: skip
"""Share of the groups of each form; `corpus.FORMS` describes the first five."""
FIRST_FORMS = {
    "crop": 0.14, "thumbnail": 0.15, "crops": 0.03, "thumbnails": 0.03, "calls": 0.03, "told": 0.16,
    "print": 0.16, "page": 0.09, "prints": 0.08, "programs": 0.05, "pages": 0.02, "searches": 0.06,
}  # fmt: skip
"""The same at the beginning: seeing comes first, and finding and copying what is told, which shows no images."""
LATER_FORMS = {
    "last": {
        "crops": 0.04, "thumbnails": 0.04, "calls": 0.10, "prints": 0.10, "programs": 0.20, "pages": 0.02,
        "searches": 0.25, "told": 0.25,
    },
    "copies": {"crops": 0.04, "calls": 0.06, "prints": 0.08, "programs": 0.15, "searches": 0.32, "told": 0.35},
}  # fmt: skip
"""The same in later stages, each with a learning rate that rises once more: finding, adding and copying come last."""
KEYS = {form: "look" for form in ("crop", "thumbnail", "crops", "thumbnails", "calls", "page", "pages")} | {
    "print": "code", "prints": "code", "programs": "code", "searches": "search", "told": "search",
}  # fmt: skip
"""Tools that a form needs, of `corpus_style.TOOLSETS`. Half of the groups offer all instead."""


def make_group(rng: np.random.Generator, size: int, form: str, split: str = "train") -> PretrainGroup:
    """Draw images and `size` continuations of one form of `FORMS`; see `corpus.make_group`."""
    key = KEYS[form] if rng.random() < 0.5 else "all"
    if form == "searches":
        return searches(rng, size, split, key)
    style = style_of(key)
    if form == "told":
        return told(rng, size, style)
    if form in ("print", "page"):
        return {"print": corpus_code.one_print, "page": corpus_code.one_page}[form](rng, split, style)
    if form in ("prints", "programs", "pages"):
        return getattr(corpus_code, form)(rng, size, split, style)
    return corpus.make_group(rng, size, form, split, style)


def corpus_texts(count: int, seed: int) -> list[str]:
    """Return `count` conversations as text, `<image>` for images: what the tokenizer is trained on."""
    rng, texts = np.random.default_rng(seed), []
    while len(texts) < count:
        group = make_group(rng, 8, str(rng.choice(list(FORMS), p=list(FORMS.values()))))
        texts.append(group.prompt)
        texts += ["".join(segment.text for segment in response) for response in group.responses]
    return texts[:count]
