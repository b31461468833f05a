"""Processors with Qwen's own vocabulary, built from the byte-pair ranks that the dashscope package carries."""

import functools
from importlib.metadata import distribution
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from imagent_jax.model.processor import Processor

CACHED = Path("~/.cache/imagent_jax/tests/qwen-vocabulary.json").expanduser()
SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end",
    "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
CALLS = ["<tool_call>", "</tool_call>"]
CODE = [f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")]
MARKERS = {
    "Qwen2-VL": [],
    "Qwen2.5-VL": [*CALLS, *CODE],
    "Qwen3-VL": [*CALLS, *CODE, "<tool_response>", "</tool_response>", "<think>", "</think>"],
}
"""Added tokens of each family after `SPECIAL`, in the order of their ids."""
ROWS = 151_936
"""Rows of the published embeddings: more than there are tokens."""


@functools.cache
def merged() -> Tokenizer:
    """Byte pairs alone: the 151,643 tokens that all families share."""
    if not CACHED.exists():
        ranks = str(distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken"))
        vocab, merges = TikTokenConverter(ranks).extract_vocab_merges_from_model(ranks)
        CACHED.parent.mkdir(parents=True, exist_ok=True)
        written = CACHED.with_suffix(".new")
        Qwen2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer.save(str(written))
        written.rename(CACHED)
    return Tokenizer.from_file(str(CACHED))


@functools.cache
def qwen_processor(family: str) -> Processor:
    """The processor of a family in `MARKERS`."""
    base = merged()
    tokenizer = Tokenizer(base.model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = base.normalizer, base.pre_tokenizer, base.decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=token in CODE, normalized=False) for token in MARKERS[family]])
    return Processor(PreTrainedTokenizerFast(tokenizer_object=tokenizer), {})
