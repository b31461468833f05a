"""The stop rule: a turn ends with the token that completes a stop string in its text, however tokens cut that text."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from imagent_jax.model.processor import Processor


@lru_cache(maxsize=4)
def stop_table(processor: Processor, strings: tuple[str, ...], vocab_size: int) -> np.ndarray:
    """Return the automaton that finds `strings` in the text of a turn: the next state, by state and token id, int16 [S V].

    A turn begins in state 0. The next state S means that the text contains a stop string. Other states are what of the text
    may still become one. Tokens may hold any part of a string, and text before or after it.

    Args:
        strings: stop strings; the text of a special token is its content.
        vocab_size: V, the rows of the embedding. Ids that the tokenizer lacks have no text.
    Raises:
        ValueError: a string is empty or not ASCII. Tokens may cut other characters into bytes.
    """
    if not all(string and string.isascii() for string in strings):
        raise ValueError(f"A turn cannot end at one of {list(strings)!r}; stop strings are of ASCII characters.")
    step = automaton(strings)
    texts = [text.encode() for text in processor.token_texts(vocab_size)]
    sizes = np.asarray([len(text) for text in texts])
    order = np.argsort(-sizes, kind="stable")  # longest first: the first n tokens have a byte j
    first = np.cumsum(sizes[order]) - sizes[order]
    data = np.frombuffer(b"".join(texts[i] for i in order), np.uint8)
    state = np.repeat(np.arange(len(step) - 1, dtype=np.int16)[:, None], vocab_size, axis=1)
    for j in range(sizes.max()):
        n = np.count_nonzero(sizes > j)
        state[:, :n] = step[state[:, :n], data[first[:n] + j]]
    table = np.empty_like(state)
    table[:, order] = state
    return table


def automaton(strings: Sequence[str]) -> np.ndarray:
    """Return the next state by state and byte, int16 [S + 1, 256] (Aho and Corasick 1975). From state S, the last, no way leads.

    A state is the longest end of the text that is the beginning of a string; state 0 is the empty one.
    """
    ends = tuple(string.encode() for string in strings)
    states = sorted({end[:i] for end in ends for i in range(len(end))}, key=len)
    number = {text: i for i, text in enumerate(states)}
    step = np.full((len(states) + 1, 256), len(states), np.int16)
    for text, i in number.items():
        for byte in range(256):
            read = text + bytes([byte])
            if not read.endswith(ends):
                step[i, byte] = next(number[read[k:]] for k in range(len(read) + 1) if read[k:] in number)
    return step
