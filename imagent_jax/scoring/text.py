"""Scores of answers that are texts, options, numbers and sets. Texts in any script; ASCII texts score as in SQuAD."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

_OPTION = re.compile(r"(?:image\s+)?([1-9][0-9]*)|\(([a-z])\)|([a-z])\)?", re.IGNORECASE | re.ASCII)
_SPACE = "\u00a0\u2009\u202f"  # no-break, thin and narrow no-break space: the thousands separators of SI and of French
_NUMBER = re.compile(
    rf"[-+]?(?:(?:[0-9]{{1,3}}(?:(?P<mark>[,{_SPACE}])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*)?|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\U00020000-\U0003ffff"
)
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese (after `fold`)."""
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^{_UNSPACED}]+")
_FULL_STOPS = (".", "。", "।", "۔", "።")
_ARTICLES = ("a", "an", "the")
_SEPARATOR = re.compile("[,;\n、،؛]")
_MARKS = 30
"""Most combining marks after a character (UAX 15, stream-safe text): `unicodedata.normalize` sorts them in quadratic time."""


class BadReference(ValueError):
    """A reference answer that is not of its answer type. The message is one sentence with a remedy."""


class _Folding(dict):
    """Table for `str.translate` from a character to its plain form."""

    SHAPES = ("<wide>", "<narrow>", "<small>", "<vertical>", "<font>", "<isolated>", "<initial>", "<medial>", "<final>")

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char) == "Cf" or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
            plain = ""  # invisible: zero-width spaces, directions, variation selectors
        elif (digit := unicodedata.decimal(char, None)) is not None:
            plain = str(digit)
        else:
            same = unicodedata.decomposition(char).partition(" ")[0] in self.SHAPES
            plain = unicodedata.normalize("NFKC", char) if same else char
        self[code] = plain
        return plain


_FOLDING = _Folding(str.maketrans("‐‑‒–−‘’“”٫٬İ", "-----''\"\".,i"))


def fold(text: str) -> str:
    """Return text with one form of each character, without case.

    Full-width, half-width and styled forms, typographic quotes, hyphens and minus signs become plain ones, decimal digits of any
    script 0 to 9, and invisible characters vanish. Composed and decomposed accents are the same (Unicode, definition D145).
    Superscripts stay, since 10² is not 102. An ASCII text is only put into lower case.
    """
    if text.isascii():
        return text.lower()
    kept, marks = [], 0
    for char in text.translate(_FOLDING):
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= _MARKS:
            kept.append(char)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", "".join(kept)).casefold())


def _tokens(text: str) -> Iterator[str]:
    text = "".join(c for c in fold(text) if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    for word in text.split():
        if word not in _ARTICLES:
            yield from _TOKEN.findall(word)


def normalise(text: str) -> str:
    """Return the tokens of a text, folded, without punctuation and articles, with single spaces.

    A token is a word (SQuAD v1.1, arXiv 1606.05250), or a character of a script without spaces between words (MLQA, arXiv
    1910.07475, does so for Chinese).
    """
    return " ".join(_tokens(text))


def _unstopped(text: str) -> str:
    """Return text folded, without white space around it and without one final full stop."""
    text = fold(text).strip()
    return text[:-1] if text.endswith(_FULL_STOPS) else text


def _bare(text: str) -> str:
    """Return text as `_unstopped`, with single spaces."""
    return " ".join(_unstopped(text).split())


def exact(prediction: str, answer: str) -> float:
    """Return 1 if both texts are equal after `fold`, up to white space and one final full stop, else 0.

    Stricter than SQuAD's `exact_match`, which accepts "3.5" for "35", "-5" for "5" and "the" for "A".
    """
    return float(_bare(prediction) == _bare(answer))


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if both texts are equal after `normalise`, else 0: SQuAD's exact match, reported beside `f1`."""
    a, b = _or_plain(prediction, answer)
    return float(a == b)


def _or_plain(prediction: str, answer: str) -> tuple[str, str]:
    """Normalise both texts, or only `_bare` them if nothing of the reference would remain (as for the option "A")."""
    rule = normalise if normalise(answer) else _bare
    return rule(prediction), rule(answer)


def choice(prediction: str, answer: str) -> float:
    """Return 1 if both texts name the same option, else 0.

    Accepted forms: 'Image 2' or '2' for an image; 'B', '(b)', 'B)' or 'B.' for a letter. Text around an option is wrong.

    Raises:
        BadReference: the reference names no option.
    """
    expected = _option(answer)
    if expected is None:
        raise BadReference(f"Answer {answer!r} names no option; write 'Image 2', '2' or 'B', or use answer type 'exact'.")
    return float(_option(prediction) == expected)


def _option(text: str) -> str | None:
    match = _OPTION.fullmatch(_bare(text))
    return None if match is None else next(group for group in match.groups() if group).upper()


def number(prediction: str, answer: str) -> float:
    """Return 1 if both texts are the same number ('7' and '7.0'), else 0.

    Integers must be equal, other numbers within a relative 1e-6. Thousands may have commas or thin spaces. Units,
    fractions, exponents and text around a number are wrong.

    Raises:
        BadReference: the reference is not a number.
    """
    expected = _value(answer)
    if expected is None:
        raise BadReference(f"Answer {answer!r} is not a number; write one like '7' or '0.5', or use answer type 'exact'.")
    value = _value(prediction)
    if value is None:
        return 0.0
    if value == value.to_integral_value() and expected == expected.to_integral_value():
        return float(value == expected)
    return float(math.isclose(float(value), float(expected), rel_tol=1e-6, abs_tol=1e-12))


def _value(text: str) -> Decimal | None:
    """Return the exact number that a text is; None: it is none, or beyond all floats."""
    text = _unstopped(text)
    if not _NUMBER.fullmatch(text):
        return None
    text = re.sub(f"[,{_SPACE}]", "", text)
    return Decimal(text) if math.isfinite(float(text)) else None


def f1(prediction: str, answer: str) -> float:
    """Return token F1 after `normalise`, repeated tokens counted as in SQuAD (arXiv 1606.05250)."""
    a, b = (text.split() for text in _or_plain(prediction, answer))
    return 2 * sum((Counter(a) & Counter(b)).values()) / max(len(a) + len(b), 1)


def set_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the sets of tokens after `normalise`, as the MAT benchmark scores (Visual-ARFT, arXiv 2505.14246).

    2 |P and A| / (len(P) + len(A)), in which a token counts once above and each time below. Equal texts score 1.
    """
    a, b = (text.split() for text in _or_plain(prediction, answer))
    return 1.0 if a == b else 2 * len({*a} & {*b}) / max(len(a) + len(b), 1)


def items(prediction: str, answer: str) -> float:
    """Return the F1 of two sets of items, 2 |P and A| / (|P| + |A|), whatever their order.

    Commas, semicolons and lines separate items; square or curly brackets around the whole and quotes around an item are left out.
    Items are equal as in `exact`.

    Raises:
        BadReference: the reference has no item.
    """
    expected = _items(answer)
    if not expected:
        raise BadReference(f"Answer {answer!r} has no item; write items with commas between them, such as 'cat, dog'.")
    found = _items(prediction)
    return 2 * len(found & expected) / (len(found) + len(expected))


def _items(text: str) -> set[str]:
    text = _unstopped(text)
    text = text[1:-1] if text[:1] + text[-1:] in ("[]", "{}") else text
    return {bare for item in _SEPARATOR.split(text) if (bare := _bare(item.strip().strip("'\"")))}
