"""A question in the making keeps all that happened to it, on disk too."""

from dataclasses import replace

import pytest

from imagent_jax.curation.question import Event, Evidence, Question

SOME = Question(
    uid="q1", text="Is the ship of Image 1 older?", images=("a", "b"), answer="A", kind="compare", options=("yes", "no"),
    evidence=(Evidence(2, (0, 10, 500, 1000), "Which year?", "1912"), Evidence(1, (0, 0, 9, 9))), group="g", answer_type="choice",
    history=(Event("proposer", "proposed", {"model": "x", "boxes": [1, 2]}),),
)  # fmt: skip
LINE = SOME.to_json()


def test_a_question_is_read_back_as_written():
    assert Question.from_json(SOME.to_json()) == SOME and "\n" not in SOME.to_json()
    later = SOME.after(Event("filter:vague", "dropped"), answer="B")
    assert (later.answer, later.history[:1], later.history[1].what) == ("B", SOME.history, "dropped")
    assert Question.from_json(later.to_json()) == later


def test_a_place_may_say_nothing_of_what_it_shows():
    line = LINE.replace(', "asks": "", "shows": ""', "")
    assert line != LINE and Question.from_json(line) == SOME


@pytest.mark.parametrize("line", ["{", "[]", "{}", LINE.replace('"compare"', '"guess"'), LINE.replace('"uid"', '"id"'),
                                  LINE.replace('"image": 2', '"image": 3')])  # fmt: skip
def test_a_line_that_is_no_question_is_a_sentence(line):
    with pytest.raises(ValueError, match=r"Expecting|no question|does not exist|names image 3"):
        Question.from_json(line)


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (5, 0, 1, 5), (0, 0, 1001, 5), (-1, 0, 5, 5), (0, 7, 5, 7)])
def test_a_box_is_inside_its_image(box):
    with pytest.raises(ValueError, match="is empty or not within 0 to 1000"):
        Evidence(1, box)
    with pytest.raises(ValueError, match="of image 0"):
        Evidence(0, (0, 0, 5, 5))


def test_the_numbers_of_a_place_are_whole():
    place = Evidence(2.0, (0, 1.0, 5.0, 5))
    assert repr(place) == repr(Evidence(2, (0, 1, 5, 5))) and ("a", "b")[place.image - 1] == "b"
    for image, box in [(1.5, (0, 0, 5, 5)), (1, (0, 0, 5.5, 6)), (float("inf"), (0, 0, 5, 5)), (1, (0, 0, float("nan"), 5))]:
        with pytest.raises(ValueError, match="is not in whole numbers"):
            Evidence(image, box)


def test_what_was_said_of_an_earlier_wording_does_not_count():
    def said(*events):
        return [event.facts["n"] for event in replace(SOME, history=events).said("answered")]

    one, two = (Event("answerer 1", "answered", {"n": n}) for n in (1, 2))
    accepted, mended = Event("review:anna", "accepted"), Event("review:ben", "mended", {"changes": {"answer": "B"}})
    settled = Event("review:cleo", "accepted", {"adjudicator": True})
    assert said(one, Event("repairer", "repaired"), two) == [2] and said(one, two, accepted) == [1, 2]
    assert said(one, mended) == said(one, accepted, replace(mended, facts={"adjudicator": True})) == []
    assert said(one, accepted, mended, settled) == [1]  # it stays as it was
