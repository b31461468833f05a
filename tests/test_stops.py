"""A turn ends with the token that completes a stop string in its text: Qwen's vocabulary against a search of the text."""

import itertools

import numpy as np
import pytest
from qwen_vocabulary import MARKERS, ROWS, qwen_processor

from imagent_jax.chat import QWEN
from imagent_jax.model.processor import Processor
from imagent_jax.rollout.stops import stop_table
from imagent_jax.tiny.base import base_folder
from imagent_jax.types import Markup

BEFORE = ["", "}", "}}", "}}\n", '"}}', '"}}\n', "]}}", "}\n}\n", " ", "\n", "é", '{"a": "日']
AFTER = ["", "\n", "\n\n", "\r\n", " ", ">", '"', "</", "<|im_end|>", "}", "é", "</tool_call>"]
TRICKY = [
    "</</tool_call>", "<</tool_call>", "</tool_call</tool_call>", "</tool_</tool_call>", "< /tool_call>", "</tool_call",
    "<|im_<|im_end|>", "<|<|endoftext|>", "<|im_end|", "<tool_call></tool_cal></tool_call>", "</TOOL_CALL></tool_call>",
]  # fmt: skip


def by_table(table: np.ndarray, ids) -> int | None:
    """The number of tokens at which the table ends a turn; None: it goes on."""
    state = 0
    for count, token in enumerate(ids, 1):
        state = table[state, token]
        if state == len(table):
            return count
    return None


def by_text(processor: Processor, ids) -> int | None:
    """The number of tokens whose text first has a stop string."""
    whole = range(1, len(ids) + 1)
    return next((n for n in whole if any(stop in processor.decode(ids[:n]) for stop in QWEN.stop_strings)), None)


def spellings(processor: Processor, text: str, rng, count: int) -> list[list[int]]:
    """Ways to cut a text into tokens of the vocabulary, at random."""
    number = {piece: i for i, piece in reversed(list(enumerate(processor.token_texts(len(processor.tokenizer)))))}
    found = []
    for _ in range(count):
        ids, at = [], 0
        while at < len(text):
            sizes = [n for n in range(1, 13) if text[at : at + n] in number]
            n = rng.choice(sizes) if sizes else 1
            ids += [number[text[at : at + n]]] if sizes else processor.encode(text[at])
            at += n
        found.append(ids)
    return found


@pytest.fixture(scope="module")
def table():
    return stop_table(qwen_processor("Qwen2-VL"), QWEN.stop_strings, ROWS)


def test_every_ordinary_end_of_a_call_ends_the_turn_with_its_token(table):
    """Most are not cut as the stop string alone is."""
    processor = qwen_processor("Qwen2-VL")
    alone, otherwise = processor.encode("</tool_call>"), 0
    assert [processor.decode([i]) for i in alone] == ["</", "tool", "_call", ">"]
    for before, after in itertools.product(BEFORE, AFTER):
        ids = processor.encode(Markup(f"{before}</tool_call>{after}"))
        end = by_table(table, ids)
        assert end == by_text(processor, ids) is not None, (before, after)
        assert "</tool_call>" in processor.decode(ids[:end]) and "</tool_call>" not in processor.decode(ids[: end - 1])
        otherwise += ids[end - len(alone) : end] != alone
    assert otherwise > 72


@pytest.mark.parametrize("family", MARKERS)
def test_stop_strings_are_found_however_tokens_cut_them(family):
    processor, rng = qwen_processor(family), np.random.default_rng(0)
    table = stop_table(processor, QWEN.stop_strings, ROWS)
    texts = [f"{a}{stop}{b}" for a, b in (("}", "\n"), ("<", ">"), ("</", "")) for stop in QWEN.stop_strings]
    ends = []
    for text in (*TRICKY, *texts):
        for ids in (processor.encode(text), processor.encode(Markup(text)), *spellings(processor, text, rng, 12)):
            assert processor.decode(ids) == text
            ends.append(by_table(table, ids))
            assert ends[-1] == by_text(processor, ids), (text, ids)
    assert len(set(ends)) > 8 and None in ends


def test_other_tokens_do_not_end_a_turn(table):
    """Among all tokens in random order, cut characters among them; and padding rows have no text."""
    processor = qwen_processor("Qwen2-VL")
    ids = np.random.default_rng(1).permutation(151_643)[:40_000]
    assert by_table(table, ids) is None and "�" in processor.decode(ids[:2000])
    states = np.arange(len(table))[:, None]
    assert (table[:, len(processor.tokenizer) :] == states).all()
    assert {processor.decode([i]) for i in np.flatnonzero(table[0] == len(table))} == {"<|im_end|>", "<|endoftext|>"}


def test_the_tiny_base_ends_turns_likewise():
    processor, rng = Processor.from_pretrained(base_folder()), np.random.default_rng(2)
    table = stop_table(processor, QWEN.stop_strings, 1088)
    for text in (*TRICKY, "So.</tool_call>\n", "é</tool_call>", "日<|im_end|>"):
        for ids in (processor.encode(text), processor.encode(Markup(text)), *spellings(processor, text, rng, 8)):
            assert by_table(table, ids) == by_text(processor, ids), (text, ids)
    whole = {processor.decode([i]) for i in np.flatnonzero(table[0] == len(table))}
    assert whole == {"<|im_end|>", "<|endoftext|>", "</tool_call>"}


@pytest.mark.parametrize("bad", ["", "fin é"])
def test_a_stop_string_that_is_not_ascii_is_refused(bad):
    with pytest.raises(ValueError, match="stop strings are of ASCII characters"):
        stop_table(qwen_processor("Qwen2-VL"), ("<|im_end|>", bad), ROWS)
