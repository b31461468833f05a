"""The strict rule of options: which replies name exactly one."""

import pytest

from imagent_jax.evals.rules import open_answer, option_of, strict_choice, strict_f1, unread
from imagent_jax.types import Task

TASK = Task("t", "?", (), "B", "choice", options=("a red car", "blue", "a blue car", "none"))
PLAIN = Task("t", "?", (), "B", "choice")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("B.", "B"), ("**B**", "B"), ("Blue.", "B"), ("B. blue", "B"), ("(B) blue", "B"), 
        ("b: blue", None),
        ("A red car", "A"), ("Red car", "A"), ("A", "A"), ("A blue car", "C"), ("B. none", None), ("E", None), ("", None),
        ("The answer is B", "B"), ("The answer is **B**.", "B"), ("Answer: (b)", "B"), ("the correct option is B, blue", "B"),
        ("Final answer: B", "B"), ("I take option B because it is blue", "B"), ("The answer is B. blue", "B"),
        (r"so \\boxed{B}", "B"), (r"\\boxed{\\text{(B)}}", "B"), ("The answer is B because of A", "B"),
        ("The answer is A red car", "A"), ("The answer is A blue car", None), ("The answer is a car", None),
        ("The answer is A or B", None), ("Answer: A, B", None), ("The answer is B. No, the answer is C.", None),
        ("The answer is not B", None), ("Based on the image", None), ("Certainly", None), ("I see B there", None),
        ("The answer is T", None), ("The answer is Blue-ish", None), ("What is the answer? C is near", None),
    ],
)  # fmt: skip
def test_a_reply_names_one_option_or_none(reply, letter):
    reply = reply.replace("\\\\", "\\")
    assert option_of(TASK, reply) == letter and strict_choice(TASK, reply) == (letter == "B")
    assert unread(TASK, reply) == (letter is None)


def test_options_in_the_text_of_a_question_are_letters():
    assert [option_of(PLAIN, reply) for reply in ("B", "The answer is (D).", "Blue", "Z")] == ["B", "D", None, "Z"]
    image = Task("t", "?", (b"", b""), "Image 2", "choice")
    assert [strict_choice(image, reply) for reply in ("Image 2", "2", "image 2.", "Image 1", "B", "two")] == [1, 1, 1, 0, 0, 0]
    assert [unread(image, reply) for reply in ("Image 1", "two")] == [False, True]
    assert not unread(Task("t", "?", (), "seven"), "anything")


def test_open_answers_score_by_their_type():
    number, text = Task("t", "?", (), "3.5", "number"), Task("t", "?", (), "the red bus", other_answers=("bus",))
    assert [open_answer(number, reply) for reply in ("3.50", "35")] == [1, 0]
    assert [open_answer(text, reply) for reply in ("Red bus.", "A bus", "red", " ")] == [1, 1, 0, 0]
    assert strict_f1("about 3.5 m", "3.5 m") == 2 * 2 / 5 and strict_f1("35 m", "3.5 m") == 1 / 2
