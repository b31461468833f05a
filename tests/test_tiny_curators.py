"""The embedded agents: they see what the images of a conversation show, and answer as the tiny world's own tasks do."""

import dataclasses
import io

import numpy as np
import pytest
from curation_parts import tiny_pictures
from PIL import Image

from imagent_jax.curation.agents import load_backend
from imagent_jax.curation.roles import LOOKING, SCHEMAS, _picture, _png, _text
from imagent_jax.tiny.curators import TinyCurators, TinyCuratorsSettings
from imagent_jax.tiny.curators_answers import known_from_text, proposals, solve
from imagent_jax.tiny.world import KINDS, make_task

SURE = {"misread": 0.0, "glance": 0.0, "slip": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_worlds_own_tasks(kind):
    for number in range(60):
        task, scenes = make_task(np.random.default_rng((5, number)), "train", kind)
        answers = solve(task.question, {n: scene.tags for n, scene in enumerate(scenes, 1)})
        assert answers == [task.answer], task.question


def test_proposals_have_one_answer_which_no_image_alone_gives_where_several_are_claimed():
    kinds = set()
    for number in range(30):
        _, scenes = make_task(np.random.default_rng((6, number)), "train")
        seen = {n: scene.tags for n, scene in enumerate(scenes, 1)}
        made = proposals(seen)
        kinds |= {one["kind"] for one in made}
        assert len({one["question"] for one in made}) == len(made)
        for one in made:
            assert solve(one["question"], seen) == [one["answer"]]
            alone = [solve(one["question"], {n: tags}) for n, tags in seen.items()]
            assert not one["several"] or all(answers != [one["answer"]] for answers in alone), one
            assert known_from_text(one["question"]) is None
    assert kinds == {"read", "sum", "relate", "compare", "difference", "count", "locate", "order"}


@pytest.mark.parametrize(("text", "answer"), [
    ("What digit is on the red tag in Image 1, which is three plus four?", "7"), ("It is a 3, is it not?", None),
    ("What is it (it is 3)?", "3"), ("Which one (it is Image 2)?", "Image 2"), ("How many, half of 8?", "4"),
    ("What digit, two less than five?", "3"), ("How many, as many as a week has days?", "7"),
    ("What is the sum of the digits on the red tag in Image 1 and the blue tag in Image 3?", None),
    ("How many tags show a digit larger than 4?", None),
])  # fmt: skip
def test_words_alone_give_what_they_state_compute_or_tell(text, answer):
    assert known_from_text(text) == answer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny_pictures(tmp_path_factory.mktemp("curators"), 12)
    return folder, TinyCurators(settings(folder))


def settings(folder, **changes):
    return TinyCuratorsSettings(folders=(str(folder / "pictures"), str(folder / "pictures_test")), **{**SURE, **changes})


def conversation(*parts):
    return [{"role": "system", "content": "as you like"}, {"role": "user", "content": list(parts)}]


def test_a_crop_shows_the_tags_that_are_whole_in_it(world):
    folder, agents = world
    crops = right = 0
    rng = np.random.default_rng(0)
    for file in sorted((folder / "pictures").glob("*.jpg"))[:6]:
        image = Image.open(file).convert("RGB")
        [tags] = agents._images([_text("Image 1:"), _picture(file.read_bytes())]).values()
        for _ in range(12):
            left, top = (int(rng.integers(0, side - 90)) for side in image.size)
            box = (left, top, left + int(rng.integers(40, 90)), top + int(rng.integers(40, 90)))
            reach = [(tag, tag.x * image.width, tag.y * image.height) for tag in tags]  # the colour of a tag is 22 pixels wide
            whole = {
                tag.colour
                for tag, x, y in reach
                if box[0] <= x - 11 and x + 11 <= box[2] and box[1] <= y - 11 and y + 11 <= box[3]
            }
            [seen] = agents._images([_picture(_png(image.crop(box)))]).values()
            crops, right = crops + bool(whole), right + ({tag.colour for tag in seen} == whole)
    assert right == 72 and crops > 5


def test_without_images_no_tag_is_seen_and_no_crop_is_known_by_heart(world):
    _, agents = world
    question = _text("Question: What digit is on the red tag in Image 1?")
    assert agents.complete(conversation(question), SCHEMAS["text_attack"])["sure"] is False
    assert agents.complete(conversation(question), SCHEMAS["image_attack"]) == {"answer": "cannot tell", "sure": False}
    grey = _picture(_png(Image.new("RGB", (60, 60), (128, 128, 128))))
    assert agents.complete(conversation(grey, _text("Question: What colour is the tag?")), SCHEMAS["crop"]) == {
        "answer": "cannot tell"
    }


def test_an_answerer_asks_for_crops_of_what_the_question_names_and_reads_them(world):
    folder, agents = world
    files = sorted((folder / "pictures").glob("*.jpg"))[:2]
    shown = [part for n, file in enumerate(files, 1) for part in (_text(f"Image {n}:"), _picture(file.read_bytes()))]
    tags = agents._images(shown)
    first = tags["Image 1"][0]
    question = _text(f"Question: What digit is on the {first.colour} tag in Image 1?\n\nYou are answerer 1.")
    asked = agents.complete(conversation(*shown, question), LOOKING)
    left, top, right, bottom = asked["look"]["box"]
    assert asked["look"]["image"] == 1 and left < 1000 * first.x < right and top < 1000 * first.y < bottom
    image = Image.open(files[0]).convert("RGB")
    w, h = (side / 1000 for side in image.size)
    crop = image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))
    part = {"role": "user", "content": [_text(f"Part {asked['look']['box']} of Image 1:"), _picture(_png(crop))]}
    said = {"role": "assistant", "content": "a look"}
    for seed in range(8):  # one that cannot read at a glance reads the crop
        blind = TinyCurators(settings(folder, glance=1.0, seed=seed))
        assert blind.complete([*conversation(*shown, question), said, part], LOOKING) == {
            "look": None, "answer": str(first.digit), "sure": True,
        }  # fmt: skip
        assert blind.complete(conversation(*shown, question), SCHEMAS["answerer"])["answer"] != str(first.digit)


def test_mistakes_have_their_chance_and_depend_on_the_conversation_and_the_seed(world):
    folder, _ = world
    [file, *_] = sorted((folder / "pictures").glob("*.jpg"))
    tag = TinyCurators(settings(folder))._images([_text("Image 1:"), _picture(file.read_bytes())])["Image 1"][0]

    def answers(**changes):
        agents = TinyCurators(settings(folder, **changes))
        shown = [_text("Image 1:"), _picture(file.read_bytes())]
        text = f"Question: What digit is on the {tag.colour} tag in Image 1?\n\nYou are answerer"
        return [agents.complete(conversation(*shown, _text(f"{text} {n}.")), SCHEMAS["answerer"])["answer"] for n in range(200)]

    wrong = sum(answer != str(tag.digit) for answer in answers(glance=0.3))
    assert abs(wrong / 200 - 0.3) < 0.12  # 3.7 standard deviations
    assert answers(glance=0.3) == answers(glance=0.3) != answers(glance=0.3, seed=1)


def test_the_repairer_keeps_the_question_where_only_its_answer_is_wrong(world):
    folder, agents = world
    files = sorted((folder / "pictures").glob("*.jpg"))[:2]
    shown = [part for n, file in enumerate(files, 1) for part in (_text(f"Image {n}:"), _picture(file.read_bytes()))]
    made = agents.complete(conversation(*shown, _text("Proposal 0. There are 0 earlier questions")), SCHEMAS["proposer"])
    import json

    wrong = json.dumps(made | {"answer": "no such"})
    mended = agents.complete(conversation(*shown, _text(f"The question:\n{wrong}\n\nFound:\n- x")), SCHEMAS["repairer"])
    assert mended == made
    later = agents.complete(conversation(*shown, _text("Proposal 9. There are 3 earlier questions")), SCHEMAS["proposer"])
    assert later["question"] != made["question"]


def test_a_backend_is_named_with_its_settings(world, tmp_path):
    folder, agents = world
    name = "imagent_jax.tiny.curators:TinyCurators"
    made = load_backend(name, dataclasses.asdict(settings(folder)), "agents.backend")
    assert isinstance(made, TinyCurators) and made.scenes == agents.scenes
    with pytest.raises(ValueError, match=r"no setting agents\.settings\.misred; there are folders, misread"):
        load_backend(name, {"misred": 1}, "agents.backend")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_backend("imagent_jax.tiny.curators:None_", {}, "agents.backend")
    with pytest.raises(ValueError, match=r"scenes\.json does not exist; make the pictures"):
        TinyCurators(TinyCuratorsSettings(folders=(str(tmp_path),)))
    with pytest.raises(ValueError, match="folders is empty"):
        TinyCurators(TinyCuratorsSettings())


def test_pictures_are_those_of_the_split_that_their_folder_names(world):
    folder, agents = world
    files = [sorted(place.glob("*.jpg")) for place in (folder / "pictures", folder / "pictures_test")]
    assert [len(own) for own in files] == [12, 3] and len(agents.scenes) == 15
    photos = [{line.split(",")[3] for line in (own[0].parent / "licences.csv").read_text().splitlines()[1:]} for own in files]
    assert not photos[0] & photos[1]
    assert Image.open(io.BytesIO(files[0][0].read_bytes())).format == "JPEG"
