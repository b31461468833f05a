"""The tiny base's pre-training data and tokenizer: skills, and never the call that a question needs."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from scripted_run import execute

from imagent_jax.chat import QWEN
from imagent_jax.images.prepare import CLIP_MEAN, CLIP_STD, smart_resize
from imagent_jax.model.families import read_folder
from imagent_jax.model.processor import Processor
from imagent_jax.model.vision import normalise
from imagent_jax.tiny.base import base_folder
from imagent_jax.tiny.corpus import (
    FORMS,
    PROMPT,
    SETTINGS,
    THUMBNAIL,
    THUMBNAIL_MIX,
    TOOLS,
    Segment,
    box_of,
    corpus_texts,
    crop_beside,
    crop_near,
    make_group,
    prompt_text,
    solves,
)
from imagent_jax.tiny.tokenizer import COORDINATES, MARKERS, SPECIAL, build_tokenizer
from imagent_jax.tiny.vision import HEADS, SCENES, labelled_pack, new_head, whitening
from imagent_jax.tiny.world import COLOURS, KINDS, SPLITS, make_scene, make_task, photographs
from imagent_jax.tools import ImageRegistry, to_pixels
from imagent_jax.types import CallStatus, Markup

CALL = ("visual_confirmation", {"image": 2, "label": "red", "bbox_2d": [400, 175, 600, 375]})


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, corpus_texts(2000, seed=0))
    return Processor.from_pretrained(folder)


def whole_calls(response) -> list[Segment]:
    """The response's segments, calls of which only the beginning is trained in one piece."""
    segments = []
    for segment in response:
        if segment.text.startswith(', "label"'):
            segments[-1] = Segment(segments[-1].text + segment.text, True)
        else:
            segments.append(segment)
    return segments


def questions_and_calls(group, response):
    """(questions asked so far, text of a call), for every call of a response."""
    asked = []
    for segment in whole_calls(response):
        if segment.trained and "<tool_call>" in segment.text:
            yield list(asked), QWEN.parse_call(segment.text)
        elif not segment.trained and "<tool_response>" not in segment.text:
            text = segment.text.removeprefix("\n<|im_start|>user\n")
            asked.append(text.removesuffix("<|im_end|>\n<|im_start|>assistant\n"))


def tags_shown(group, call) -> list[tuple[int, str]]:
    """(image, colour) of every tag whose centre a call shows."""
    if call.name == "visual_reflection":
        return [(n, tag.colour) for n in call.arguments["images"] for tag in group.scenes[n - 1].tags]
    number, (x1, y1, x2, y2) = call.arguments["image"], call.arguments["bbox_2d"]
    tags = group.scenes[number - 1].tags
    return [(number, t.colour) for t in tags if x1 < 1000 * t.x < x2 and y1 < 1000 * t.y < y2]


# ---- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.slow(5)
def test_no_question_is_followed_by_a_call_that_helps_to_answer_it():
    rng, calls, asked_of_tags = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        group = make_group(rng, 3, "calls")
        for response in group.responses:
            for questions, call in questions_and_calls(group, response):
                calls += 1
                shown = tags_shown(group, call)
                assert shown
                asked = [question for question in questions if not question.startswith("Look closely at the")]
                asked_of_tags += any("tag" in question for question in asked)
                assert not [(q, s) for q in asked for s in shown if solves(q, *s)]
    assert calls > 5000
    assert asked_of_tags > 0.4 * calls


@pytest.mark.parametrize("form", ["crops", "thumbnails"])
def test_other_forms_hold_no_call(form):
    rng = np.random.default_rng(1)
    for _ in range(100):
        group = make_group(rng, 4, form)
        assert not any("<tool_call>" in segment.text for response in group.responses for segment in response)


@pytest.mark.slow(9)
def test_calls_after_a_question_lean_to_its_words_one_at_a_time():
    rng, image, colour, total = np.random.default_rng(2), 0, 0, 0
    for _ in range(3500):
        group = make_group(rng, 3, "calls")
        for response in group.responses:
            questions, call = next(questions_and_calls(group, response), ([""], None))
            match = re.fullmatch(r"(?:What digit is on|Read) the (\w+) tag in Image (\d+)[?.]", questions[0])
            if match and call and call.name == "visual_confirmation":
                named = call.arguments["label"] == match[1], call.arguments["image"] == int(match[2])
                colour, image, total = colour + named[0], image + named[1], total + 1
                assert not all(named)
    assert total > 500
    assert 0.4 < image / total < 0.56 and 0.06 < colour / total < 0.2


@pytest.mark.slow(3)
def test_a_command_names_the_calls_that_follow_and_asks_nothing():
    rng, commands, seen = np.random.default_rng(6), 0, set()
    for _ in range(1000):
        group = make_group(rng, 3, "calls")
        for response in group.responses:
            if not response[0].text.startswith("Look closely at the"):
                continue
            commands += 1
            told = [(int(n), c) for c, n in re.findall(r"the (\w+) tag in Image (\d+)", response[0].text)]
            calls = [QWEN.parse_call(segment.text) for segment in response if segment.trained and "<tool_call>" in segment.text]
            assert [(call.arguments["image"], call.arguments["label"]) for call in calls] == told
            assert "?" not in response[0].text
            seen.add(len(calls))
    assert commands > 300 and seen == {1, 2}


@pytest.mark.slow(5)
def test_after_find_the_images_are_seen_in_turn_until_only_one_is_left():
    rng, found, excluded = np.random.default_rng(11), 0, 0
    for _ in range(1500):
        group = make_group(rng, 3, "calls")
        for response in group.responses:
            calls = [call for _, call in questions_and_calls(group, response)]
            text = "".join(segment.text for segment in response)
            read = [(int(image), int(digit)) for image, digit in re.findall(r"Image (\d) \w+ (\d)\.\n", text)]
            if "a digit larger than 4" not in response[0].text or not calls or len(read) < len(calls):
                continue
            answer = int(re.search("<answer>Image (.*)</answer>", text)[1])
            last, digit = read[-1]
            if digit > 4:
                assert answer == last
                found += [call.arguments["image"] for call in calls] == list(range(1, last + 1))
            elif all(digit <= 4 for _, digit in read) and len(dict(read)) == len(group.scenes) - 1:
                assert answer not in dict(read)
                excluded += 1
    assert found > 300 and excluded > 300


@pytest.mark.parametrize("kind", KINDS)
def test_solves_recognises_the_tags_that_a_question_of_the_world_depends_on(kind):
    rng = np.random.default_rng(3)
    for _ in range(25):
        task, scenes = make_task(rng, "train", kind)
        assert all(solves(task.question, *target) for target in task.meta["targets"])
        shown = {(n, tag.colour) for n, scene in enumerate(scenes, 1) for tag in scene.tags}
        helpful = {tag for tag in shown if solves(task.question, *tag)}
        assert helpful == {tuple(target) for target in task.meta["targets"]}


@pytest.mark.slow(4)
def test_a_first_turn_about_absent_tags_is_a_call_or_a_guess_and_more_often_a_call():
    rng, calls, guesses = np.random.default_rng(4), 0, 0
    for _ in range(1500):
        group = make_group(rng, 4)
        for question, first, *_ in group.responses:
            match = re.search("Read|digit|sum|Add|show [0-9]", question.text)
            if match and group.images[0].max_pixels < SETTINGS.confirm_min_pixels:
                calls, guesses = calls + ("<tool_call>" in first.text), guesses + ("<tool_call>" not in first.text)
    assert 0.7 < calls / (calls + guesses) < 0.95


# ---- what is said is true -------------------------------------------------------------------------------------------


def test_boxes_contain_their_tag_and_nothing_outside_the_image():
    rng = np.random.default_rng(5)
    for _ in range(300):
        scene = make_scene(rng, "train")
        height, width = scene.pixels.shape[:2]
        for tag in scene.tags:
            x1, y1, x2, y2 = box_of(tag)
            assert all(0 <= edge <= 1000 and edge % 25 == 0 for edge in (x1, y1, x2, y2))
            assert x1 / 1000 * width <= tag.x * width - 11 and tag.x * width + 11 <= x2 / 1000 * width
            assert y1 / 1000 * height <= tag.y * height - 11 and tag.y * height + 11 <= y2 / 1000 * height


def test_observations_are_what_the_tools_return():
    rng = np.random.default_rng(6)
    seen = 0
    for _ in range(60):
        group = make_group(rng, 4, "calls")
        for response in group.responses:
            registry = ImageRegistry()
            for scene in group.scenes:
                height, width = scene.pixels.shape[:2]
                shown = smart_resize(height, width, 28, *THUMBNAIL)
                registry.add(Image.fromarray(scene.pixels), shown=shown, min_pixels=3136, max_pixels=4704)
            segments = whole_calls(response)
            for action, shown in zip(segments, segments[1:], strict=False):
                if not (action.trained and "<tool_call>" in action.text):
                    continue
                result = execute(TOOLS, action.text, registry, SETTINGS)
                assert result.status == CallStatus.EXECUTED
                if result.name == "visual_confirmation":
                    line, number = result.parts
                    assert shown.text == (
                        f"<|im_end|>\n<|im_start|>user\n<tool_response>\n{line}\n<image>\n</tool_response><|im_end|>\n"
                        "<|im_start|>assistant\n"
                    )
                    entry = registry[number]
                    box = to_pixels(result.arguments["bbox_2d"], registry[entry.parent], SETTINGS.coordinates)
                    crop = group.scenes[entry.parent - 1].pixels[box[1] : box[3], box[0] : box[2]]
                    assert np.array_equal(np.asarray(shown.images[0].pixels), crop)
                    assert (shown.images[0].min_pixels, shown.images[0].max_pixels) == (7056, 9408)
                    seen += 1
    assert seen > 100


def test_readings_and_answers_agree_with_the_tags():
    rng, readings, answers = np.random.default_rng(7), 0, 0
    for _ in range(400):
        group = make_group(rng, 4)
        for response in group.responses:
            text = "".join(segment.text for segment in response)
            said = re.findall(r"Image (\d) (\w+) (\d)\.\n", text)
            for image, colour, digit in said:
                assert group.scenes[int(image) - 1].tag(colour).digit == int(digit)
                readings += 1
            digit = {(colour, image): int(d) for image, colour, d in said}
            question, answer = response[-2].text, re.search("<answer>(.*)</answer>", response[-1].text)
            pairs = re.findall(r"(\w+) tag in Image (\d)", question)
            if pairs and answer and all(pair in digit for pair in pairs):
                assert answer[1] == str(sum(digit[pair] for pair in pairs))
                answers += 1
    assert readings > 500
    assert answers > 100


@pytest.mark.parametrize("form", ["thumbnail", "thumbnails"])
def test_what_is_said_of_thumbnails_is_what_they_show(form):
    rng, said = np.random.default_rng(12), Counter()
    for _ in range(120):
        group = make_group(rng, 5, form)
        count = len(group.scenes)
        having = {c: [n for n, scene in enumerate(group.scenes, 1) if scene.tag(c)] for c in COLOURS}
        for asked, answered in group.responses:
            assert (asked.trained, answered.trained) == (False, True)
            question, end, rest = asked.text.partition("<|im_end|>\n<|im_start|>assistant\n")
            text = answered.text.removesuffix("<|im_end|>")
            assert end and not rest and text != answered.text
            kind = " ".join(question.split()[:2])
            if match := re.fullmatch(r"Where is the (\w+) tag in Image (\d)\?", question):
                tag = group.scenes[int(match[2]) - 1].tag(match[1])
                left, top, right, bottom = json.loads(text)
                assert abs((left + right) / 2 - 1000 * tag.x) <= 12.5 and abs((top + bottom) / 2 - 1000 * tag.y) <= 12.5
                assert [left, top, right, bottom] == box_of(tag) and (right - left, bottom - top) == (200, 200)
            elif match := re.fullmatch(r"Name the tags in Image (\d)\.", question):
                scene = group.scenes[int(match[1]) - 1]
                assert text.split() == [tag.colour for tag in sorted(scene.tags, key=lambda tag: tag.x)]
            elif match := re.fullmatch(r"(Which image has|How many images have) an? (\w+) tag\?", question):
                numbers, colour = having[match[2]], match[2]
                assert (" an " in question) == (colour == "orange")
                which = match[1] == "Which image has"
                last, answer = (numbers[0], f"Image {numbers[0]}") if which else (count, str(len(numbers)))
                seen = "".join(f"Image {n} {colour if n in numbers else 'no tag'}.\n" for n in range(1, last + 1))
                assert text == f"{seen}<answer>{answer}</answer>" and (len(numbers) == 1 or not which)
            else:
                assert re.fullmatch(r"<answer>(Image )?\d+</answer>", text)
                kind = "guess"
            said[kind] += 1
    if form == "thumbnail":
        assert said["Where is"] / 600 == pytest.approx(0.8, abs=0.06) and set(said) == {"Where is", "Name the"}
    else:
        asked = {"locate": ("Where is", "Name the"), "look": ("Which image", "How many"), "guess": ("guess",)}
        shares = {kind: sum(said[words] for words in kinds) for kind, kinds in asked.items()}
        assert {kind: n / 600 for kind, n in shares.items()} == pytest.approx(THUMBNAIL_MIX, abs=0.06)


@pytest.mark.parametrize("form", FORMS)
def test_a_group_is_of_one_form_and_of_one_split(form):
    """Photographs and digits of the split alone; prompt, images and budgets as a rollout has them."""
    rng = np.random.default_rng(13)
    for split in SPLITS:
        names = {name for name, _ in photographs(split)}
        sizes = set()
        for _ in range(20):
            group = make_group(rng, 3, form, split)
            sizes.add(len(group.images))
            assert len(group.responses) == 3 and len(group.scenes) == len(group.images)
            assert {scene.photo for scene in group.scenes} <= names
            assert group.prompt == prompt_text(len(group.images)) and group.prompt.count("<image>") == len(group.images)
            close = form in ("crop", "crops")
            assert {(i.min_pixels, i.max_pixels) for i in group.images} == {(7056, 9408) if close else (3136, 4704)}
            for image, scene in zip(group.images, group.scenes, strict=True):
                height, width = scene.pixels.shape[:2]
                assert image.pixels.size == ((round(0.2 * width), round(0.2 * height)) if close else (width, height))
        assert sizes == ({1} if form in ("crop", "thumbnail") else {2, 3, 4})


def test_the_corpus_of_a_seed_is_what_it_was():
    """Its texts by their digest: another corpus calls for another base, `python -m imagent_jax.tiny`."""
    digest = hashlib.sha256("\0".join(corpus_texts(400, seed=0)).encode())
    assert digest.hexdigest()[:16] == "f5628962c5e69d0a"


def test_crops_hold_their_tag_or_none():
    rng = np.random.default_rng(8)
    for _ in range(100):
        scene = make_scene(rng, "train", colours=["red"], digits=[3])
        height, width = scene.pixels.shape[:2]
        marked = scene.pixels * 0
        tag = scene.tags[0]
        x, y = round(tag.x * width), round(tag.y * height)
        marked[y - 11 : y + 11, x - 11 : x + 11] = 1
        scene = type(scene)(marked, scene.tags)
        assert np.asarray(crop_near(rng, scene, tag))[..., 0].sum() == 22 * 22
        assert np.asarray(crop_beside(rng, scene)).sum() == 0


def test_labels_of_a_pack_lie_where_the_tags_are(processor):
    pack = labelled_pack(np.random.default_rng(1), processor, 144, crowded=10)
    labels, image = pack.labels, pack.image[::4]
    assert all((labels[name] < classes).all() for name, classes in HEADS.items())
    shown = labels["colour"] >= 0
    assert (shown == (image >= 0)).all() and (labels["digit"] >= 0).sum() > 120
    tags = shown & (labels["colour"] < len(COLOURS))
    placed, read = labels["x"] >= 0, labels["digit"] >= 0
    assert (tags == (placed | read)).all() and not (placed & read).any() and (placed == (labels["y"] >= 0)).all()
    thumbnails = np.unique(image[placed])
    assert len(thumbnails) == SCENES and placed.sum() >= 2 * SCENES  # every tag of a thumbnail has a feature of its own


def test_every_feature_of_a_pack_has_the_labels_of_the_tag_whose_centre_lies_in_it(processor):
    """Against the scenes, drawn again from the same seed."""
    crowded = 4
    pack = labelled_pack(np.random.default_rng(2), processor, 144, crowded)
    rng = np.random.default_rng(2)
    scenes = [make_scene(rng, "train", varied=True) for _ in range(SCENES)]
    close = [tag for scene in scenes for tag in scene.tags[:2]]  # a crop for each, then a thumbnail for each scene
    image, labels = pack.image[::4], pack.labels
    assert image.max() == len(close) + SCENES - 1
    for number in range(image.max() + 1):
        own = np.flatnonzero(image == number)
        at = pack.coords[::4][own] // 2
        rows, columns = at.max(0) + 1
        assert np.array_equal(labels["row"][own], at[:, 0]) and np.array_equal(labels["column"][own], at[:, 1])
        assert len(own) == rows * columns
        colour, digit, x, y = (labels[name][own].reshape(rows, columns) for name in ("colour", "digit", "x", "y"))
        if number >= len(close):
            expected = np.full((rows, columns), len(COLOURS))
            for tag in scenes[number - len(close)].tags:
                place = int(tag.y * rows), int(tag.x * columns)
                expected[place] = COLOURS.index(tag.colour)
                assert [25 * x[place], 25 * y[place]] == box_of(tag)[:2]
            assert np.array_equal(colour, expected) and (digit == -1).all()
            assert ((x >= 0) == (colour < len(COLOURS))).all()
        elif number >= 2 * crowded:
            tag = close[number]
            assert (tag.digit, COLOURS.index(tag.colour)) in set(zip(digit.ravel(), colour.ravel(), strict=True))
            assert ((digit >= 0) == (colour < len(COLOURS))).all() and (x == -1).all() and (y == -1).all()
        else:
            assert (digit >= 0).sum() >= 2 and (x == -1).all()


@pytest.mark.slow(4)
def test_the_first_embedding_of_patches_gives_uncorrelated_outputs_of_deviation_one(processor):
    cfg = read_folder(base_folder()).vision
    pack = labelled_pack(np.random.default_rng(3), processor, 144)
    weights = whitening(cfg, [pack])
    patches = np.asarray(normalise(cfg, pack.patches[pack.image >= 0]), np.float64)
    assert weights.shape == (patches.shape[1], cfg.embed_dim)
    covariance = np.cov((patches @ weights)[:, -32:], rowvar=False)  # the largest; of small ones 1e-2 takes away some
    assert np.allclose(covariance, np.eye(32), atol=0.02)
    values = np.linalg.eigvalsh(np.cov(patches, rowvar=False))[-cfg.embed_dim :]
    assert np.allclose(np.var(patches @ weights, axis=0, ddof=1), values / (values + 1e-2), atol=1e-3)


def test_a_new_head_has_a_layer_for_every_label():
    head, other = new_head(400, seed=0), new_head(400, seed=1)
    assert {name: weights.shape for name, weights in head.items()} == {name: (400, classes) for name, classes in HEADS.items()}
    assert all(float(weights.std()) == pytest.approx(400**-0.5, rel=0.06) for weights in head.values())
    assert not np.allclose(head["x"], head["y"]) and not np.allclose(head["x"], other["x"])


def test_groups_and_texts_follow_from_the_seed():
    def content(seed):
        rng = np.random.default_rng(seed)
        groups = [make_group(rng, 4) for _ in range(5)]
        return [(g.prompt, g.responses[0][0].text, [i.pixels.tobytes() for i in g.images]) for g in groups]

    assert content(1) == content(1) != content(2)
    assert corpus_texts(50, 3) == corpus_texts(50, 3) != corpus_texts(50, 4)
    assert len(corpus_texts(50, 3)) == 50


# ---- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "".join(map(chr, range(32, 127))), "a  b\n\n c ", "  leading  ", "\n\n\r\n\t", "héé 漢字 😀 \u2581x\u00a0",
    json.dumps({"a": [1, 2.5, None], "b": {"c": "d\n"}}, indent=2), "1000 1250 17 0025 3.75 x25 25y -50", "<0x41><unk>",
    "redrum predicted blueberry", "\ue000 \ue001", "<answer>7</answer> <tool_call>\n</tool_call>", prompt_text(4),
])  # fmt: skip
def test_the_tokenizer_gives_back_the_text(processor, text):
    assert processor.decode(processor.encode(Markup(text))) == text


def test_the_files_of_a_tokenizer_say_what_a_run_needs(tmp_path):
    build_tokenizer(tmp_path, corpus_texts(200, seed=0), vocab_size=700)
    config, images, roles = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("tokenizer_config", "preprocessor_config", "special_tokens_map")
    )
    assert roles == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} and roles.items() <= config.items()
    assert "chat_template" in config and config["clean_up_tokenization_spaces"] is False
    assert (images["min_pixels"], images["max_pixels"]) == THUMBNAIL and images["patch_size"] * images["merge_size"] == 28
    assert (images["image_mean"], images["image_std"]) == (list(CLIP_MEAN), list(CLIP_STD))
    assert images["temporal_patch_size"] == 2
    small = Processor.from_pretrained(tmp_path)
    assert 700 <= len(small.tokenizer) < 800  # with coordinates and markers
    assert small.tokenizer.convert_tokens_to_ids(list(SPECIAL)) == sorted(small.tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert pieces.get_piece_size() == 700
    assert all(set(MARKERS).isdisjoint([piece]) for piece in small.tokenizer.all_special_tokens)


def test_all_of_the_corpus_comes_back(processor):
    for text in corpus_texts(300, seed=9):
        assert processor.decode(processor.encode(Markup(text))) == text


def test_values_are_tokens_of_their_own(processor):
    for value in (*"0123456789", *COORDINATES, *COLOURS, *MARKERS, *SPECIAL):
        assert len(processor.encode(Markup(value))) == 1, value

    def tokens(text):
        return [processor.decode([i]) for i in processor.encode(Markup(text))]

    assert tokens("12 17 125 1250") == ["1", "2", " ", "1", "7", " ", "125", " ", "1", "2", "5", "0"]
    values = [t for t in tokens(QWEN.render_call(*CALL)) if re.fullmatch(r"\d+|red", t)]
    assert values == ["2", "red", "400", "175", "600", "375"]
    assert not any(re.search(r"(?<!bbox_)(?<![xy])\d", t) and not t.isdigit() for t in tokens(prompt_text(2)))


def test_sequences_are_short(processor):
    def count(text):
        return len(processor.encode(Markup(text)))

    assert count("".join(QWEN.system(PROMPT.system, TOOLS.schemas(SETTINGS, PROMPT)))) < 70
    assert count(QWEN.render_call(*CALL)) == 16
    assert count("Image 2 red 7.\n<answer>7</answer><|im_end|>") <= 11
    assert count("What is the sum of the digits on the red tag in Image 1 and the blue tag in Image 3?") <= 12


def test_text_cut_as_a_rollout_cuts_it_gives_the_same_tokens(processor):
    for text in corpus_texts(300, seed=10):
        parts = [p for p in re.split(r"(?<=\n)(?=[^\n])|(?<=\d)(?=\n)|<image>", text) if p]
        whole = [p for p in text.split("<image>") if p]
        assert sum(map(processor.encode, parts), []) == sum(map(processor.encode, whole), [])


def test_the_chat_template_writes_the_prompt_of_a_rollout(processor):
    images = [{"type": "text", "text": "Image 1: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    messages = [
        {"role": "system", "content": PROMPT.system},
        {"role": "user", "content": [*images, {"type": "text", "text": "What digit is on the red tag in Image 1?"}]},
    ]
    text = processor.tokenizer.apply_chat_template(
        messages, tools=TOOLS.schemas(SETTINGS, PROMPT), tokenize=False, add_generation_prompt=True
    )
    shown = prompt_text(1).replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    assert text == f"{shown}What digit is on the red tag in Image 1?<|im_end|>\n<|im_start|>assistant\n"
