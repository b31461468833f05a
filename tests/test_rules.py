"""The strict rule of options: which replies name exactly one."""

import time

import pytest

from imagent_jax.evals.rules import open_answer, option_of, strict_choice, strict_exact, strict_f1, unread
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
        ("**Answer:** B", "B"), ("**Final Answer:** B", "B"), ("**Answer**: B", "B"), ("Option A is correct.", "A"),
        ("The answer is A because the car is red", "A"), ("The answer is B, I believe.", "B"), ("The answer is B, not A", "B"),
        (r"\\boxed{B. blue}", "B"), (r"\\boxed{\\textbf{B}}", "B"), (r"\\boxed{blue}", "B"), ("答案是B", "B"), ("答案：B。", "B"),
        ("I am not sure, but the answer is B", "B"), ("Option B is correct, not A.", "B"), ("The answer is A, C", None),
        ("Option B is wrong.", None), ("It cannot be option B.", None), ("Option B can be excluded", None),
        ("It isn't option B", None), ("Option B isn't right", None), ("Option B is wrong. The answer is C.", "C"),
        ("The answer is B. a red car", None), ("Answer: B) none", None), ("The correct answer is **B. none**", None),
        ("The answer is I think blue", None), ("The answer is T", None), ("The answer is Blue-ish", None),
        ("What is the answer? C is near", None),
        ("The answer is A thing that I like", None), ("The answer is B, E is no option", "B"),
    ],
)  # fmt: skip
def test_a_reply_names_one_option_or_none(reply, letter):
    reply = reply.replace("\\\\", "\\")
    assert option_of(TASK, reply) == letter and strict_choice(TASK, reply) == (letter == "B")
    assert unread(TASK, reply) == (letter is None)


def test_a_letter_names_its_option_although_another_option_has_it_as_its_text():
    task = Task("t", "Which letter is on the sign?", (), "A", "choice", options=("C", "B", "A", "D"))
    assert [option_of(task, reply) for reply in ("A", "A.", "The answer is A", "D", "(C)")] == ["A", "A", "A", "D", "C"]


@pytest.mark.parametrize("piece", [" ", "*", "(", "answer ", "answer:", "option A ", "not ", "is ", "\n", ", A", "答案"])
def test_the_rule_of_options_is_linear_in_a_long_reply(piece):
    reply = "The answer is" + piece * (20_000 // len(piece)) + "x"
    began = time.process_time()
    assert option_of(TASK, reply) in (None, "A")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("1/2", "12", False), ("3-2", "32", False), ("10:30", "1030", False), ("10^2", "102", False), ("1,2", "12", False),
        ("2019-2020", "20192020", False), ("C++", "C", False), ("C#", "C", False), ("A+", "A", False), ("1/2", "1 / 2", True),
        (".5", "5", False), (".5", "0.5", True), ("2.0", "2", True), ("1.50", "1.5", True), ("1,2", "1, 2", True),
        ("2019–2020", "2019-2020", True), ("1,000.0", "1000", True), ("-5", "5", False), ("+5", "5", True), ("5.", "5", True),
        ("May 3, 1999", "May 3 1999", True), ("10:30 am", "10:30 AM", True), ("v1.2.3", "v123", False), ("100", "1", False),
        ("51 (52)", "51 52", True),
        ("5(6)", "56", False),
    ],
)  # fmt: skip
def test_texts_are_equal_where_their_numbers_are(reply, answer, same):
    assert strict_exact(reply, answer) == strict_exact(answer, reply) == same


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
    assert strict_f1("2007-2008", "1994-95") == strict_f1("10/15", "10") == 0 and strict_f1("1, 2", "2,1") == 1
    assert strict_f1("about 3.5 m", "3.5 m") == 2 * 2 / 5 and strict_f1("35 m", "3.5 m") == 1 / 2
