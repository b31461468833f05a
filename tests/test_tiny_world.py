"""The tiny world: deterministic, held-out split apart, answers right, digits readable only in crops."""

import collections
import hashlib
import importlib.resources
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from imagent_jax.tiny import make_assets
from imagent_jax.tiny import world as world

THUMBNAIL = {(280, 280): (56, 56), (224, 336): (84, 56), (336, 224): (56, 84)}  # (H, W) -> shown (width, height)


@pytest.fixture(scope="module")
def tasks():
    return [world.task_at(7, "test", index) for index in range(400)]


def test_a_task_is_a_function_of_seed_split_and_index():
    first = [world.task_at(3, split, index) for split in world.SPLITS for index in (0, 5, 90)]
    again = [world.task_at(3, split, index) for split in world.SPLITS for index in (0, 5, 90)]
    assert first == again
    others = [world.task_at(4, "train", 0), world.task_at(3, "train", 1), world.task_at(3, "test", 0)]
    assert all(other.images != first[0].images for other in others)
    assert [task.uid for task in others] == ["tiny_world/train/4/0", "tiny_world/train/3/1", "tiny_world/test/3/0"]
    cycles = [(3, "train", 0), (4, "train", 0), (3, "test", 0), (3, "train", 20)]
    orders = {tuple(world.task_at(seed, split, begin + i).kind for i in range(20)) for seed, split, begin in cycles}
    assert len(orders) == 4  # of the same kinds: seed, split and block each enter
    assert all(collections.Counter(order) == world.KIND_MIX for order in orders)


def test_the_world_is_the_one_that_results_were_measured_on():
    """Questions, answers and tags of eighty tasks, by their digest, and how images look, as first published."""
    digest = hashlib.sha256()
    for split in world.SPLITS:
        for index in range(40):
            task = world.task_at(3, split, index)
            facts = [task.uid, task.question, task.answer, task.answer_type, task.kind, task.meta]
            digest.update(json.dumps(facts, sort_keys=True).encode())
    assert digest.hexdigest()[:16] == "f3769a7735ad0e29"
    plain, varied = (world.make_scene(np.random.default_rng(5), "train", varied=varied) for varied in (False, True))
    crowded = world.make_crowded_scene(np.random.default_rng(5), "train", 56, 84)
    assert (plain.photo, plain.digit_rows, varied.digit_rows) == ("clock", (248, 1170, 40), (896, 728, 1225))
    for scene, mean, deviation in [(plain, 147.566, 27.714), (varied, 119.952, 24.160), (crowded, 112.166, 70.443)]:
        assert scene.pixels.mean() == pytest.approx(mean, abs=0.2) and scene.pixels.std() == pytest.approx(deviation, abs=0.2)


@pytest.mark.parametrize("split", world.SPLITS)
def test_a_scene_is_a_piece_of_its_photograph_with_tags_of_its_digits(split):
    rng, photos, (digits, by_label) = np.random.default_rng(4), dict(world.photographs(split)), world.handwritten_digits(split)
    assert digits.shape[1:] == (14, 14) and digits.max() == 255
    assert (digits[:, :3] == 0).all() and (digits[:, :, -3:] == 0).all()  # a frame of nothing
    assert sorted(np.concatenate(by_label)) == list(range(len(digits)))
    for scales in photos.values():
        assert [min(scale.shape[:2]) for scale in scales] == [336, 336, 440, 440]
        assert all((scale == scale[..., :1]).all() for scale in scales), "black and white"
        assert all(np.array_equal(scales[i], scales[i + 1][:, ::-1]) for i in (0, 2)), "one of them mirrored"
    for _ in range(5):
        scene = world.make_scene(rng, split)
        height, width = scene.pixels.shape[:2]
        found, side = scene.pixels.astype(int), world.TAG_SIDE + 2
        for tag, row in zip(scene.tags, scene.digit_rows, strict=True):
            assert row in by_label[tag.digit] and scene.tag(tag.colour) is tag
            top, left = round(tag.y * height - side / 2), round(tag.x * width - side / 2)
            tile = found[top : top + side, left : left + side]
            for rim in (tile[0], tile[-1], tile[:, 0], tile[:, -1]):
                assert (rim == 255).all()
            brightest = tile[1:-1, 1:-1].max((0, 1))
            assert np.abs(brightest / brightest.max() - np.divide(world.RGB[tag.colour], max(world.RGB[tag.colour]))).max() < 0.02
            found[top : top + side, left : left + side] = -1
        assert scene.tag("white") is None
        seen, pieces = found[..., 0] >= 0, []
        for scale in photos[scene.photo]:
            rows, columns = scale.shape[0] - height + 1, scale.shape[1] - width + 1
            alike = [scale[:rows, at : at + columns, 0] == found[0, at, 0] for at in range(20)]  # the first of the top row
            pieces += [scale[top : top + height, left : left + width] for top, left in np.argwhere(np.all(alike, 0))]
        assert any(np.array_equal(piece[seen], found[seen]) for piece in pieces)


def test_colours_and_digits_may_be_chosen():
    rng = np.random.default_rng(6)
    scene = world.make_scene(rng, "train", colours=["red", "blue", "green", "orange"], digits=[3, 0, 9, 3])
    assert [(tag.colour, tag.digit) for tag in scene.tags] == [("red", 3), ("blue", 0), ("green", 9), ("orange", 3)]
    assert [tag.digit for tag in world.make_scene(rng, "train", digits=[1, 2, 3, 4]).tags] == [1, 2, 3, 4]
    assert [tag.colour for tag in world.make_scene(rng, "train", colours=["purple"]).tags] == ["purple"]
    assert {len(world.make_scene(rng, "train").tags) for _ in range(30)} == {2, 3}


def test_a_varied_background_is_turned_and_blended_and_its_digits_are_of_new_shapes(monkeypatch):
    monkeypatch.setattr(world, "_places", lambda *_: [])  # no tags: backgrounds alone
    counts = collections.Counter()
    for seed in range(60):
        still, moved = (
            world.make_scene(np.random.default_rng(seed), "train", colours=[], varied=varied).pixels for varied in (False, True)
        )
        square = still.shape[0] == still.shape[1]
        turns = [turn for turn in range(4) if still.shape == np.rot90(still, turn).shape]
        same = next((turn for turn in turns if np.array_equal(np.rot90(still, turn), moved)), None)
        counts["square" if square else "oblong", same] += 1
    blended = counts["square", None] + counts["oblong", None]
    assert 18 <= blended <= 42  # half of them
    assert {turn for shape, turn in counts if shape == "oblong"} == {None, 0, 2}
    assert {turn for shape, turn in counts if shape == "square"} >= {None, 1, 3}


def test_images_are_encoded_at_full_colour_and_high_quality():
    pixels = np.random.default_rng(7).integers(0, 256, (280, 280, 3), dtype=np.uint8)
    encoded = Image.open(io.BytesIO(world.encode_image(pixels)))
    assert encoded.format == "JPEG" and JpegImagePlugin.get_sampling(encoded) == 0
    scaled = [(base * 16 + 50) // 100 for base in (16, 11, 10, 16, 24, 40, 51, 61)]  # the standard table at quality 92
    assert list(encoded.quantization[0])[:8] == scaled


def test_the_assets_are_made_from_what_scikit_learn_ships(tmp_path, monkeypatch):
    make_assets.write_digits(tmp_path / "digits.npz")
    with np.load(make_assets.ASSETS / "digits.npz") as shipped, np.load(tmp_path / "digits.npz") as made:
        assert sorted(shipped) == sorted(made)
        assert all(np.array_equal(shipped[name], made[name]) and shipped[name].dtype == made[name].dtype for name in shipped)
    assert make_assets.load_photo("flower").size == (640, 427)
    sizes = iter([(1120, 560), (300, 700), *[(40, 30)] * 12])
    monkeypatch.setattr(make_assets, "load_photo", lambda name: Image.new("RGB", next(sizes)))
    written = make_assets.write_photos(tmp_path / "new" / "photos")
    files = sorted((tmp_path / "new" / "photos").iterdir())
    assert {f.name for f in files} == {f.name for f in (make_assets.ASSETS / "photos").iterdir()}
    assert written == sum(f.stat().st_size for f in files)
    named = {f.name: Image.open(f).size for f in files}
    assert [named[f"train_{name}.jpg"] for name in ("astronaut", "brick", "cell")] == [(560, 280), (240, 560), (40, 30)]


def test_images_have_the_promised_sizes_and_tags_are_in_place_and_apart(tasks):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = world.make_scene(rng, "train")
        height, width = scene.pixels.shape[:2]
        assert (height, width) in world.SIZES and scene.pixels.dtype == np.uint8
        assert 2 <= len(scene.tags) <= 3 and len({tag.colour for tag in scene.tags}) == len(scene.tags)
        assert all(0.12 <= v <= 0.88 for tag in scene.tags for v in (tag.x, tag.y))
        for i, a in enumerate(scene.tags):
            for b in scene.tags[:i]:
                assert max(abs(a.x - b.x) * width, abs(a.y - b.y) * height) >= world.TAG_GAP - 1e-6
    assert all(2 <= len(task.images) <= (3 if task.kind == "find" else 4) for task in tasks)


def test_no_two_tags_share_a_cell_of_the_grid():
    rng = np.random.default_rng(8)
    for _ in range(300):
        scene = world.make_scene(rng, "train", colours=world.COLOURS[: int(rng.integers(2, 5))])
        rows, columns = (round(side / world.CELL) for side in scene.pixels.shape[:2])
        assert (rows, columns) in ((2, 2), (2, 3), (3, 2))  # of merged features in a default thumbnail
        cells = [(int(tag.y * rows), int(tag.x * columns)) for tag in scene.tags]
        assert len(set(cells)) == len(cells)


def test_a_crowded_scene_says_what_its_tags_show():
    rng, counts = np.random.default_rng(9), []
    for _ in range(40):
        scene = world.make_crowded_scene(rng, "train", 56, 56)
        counts.append(len(scene.tags))
        for tag in scene.tags:
            patch = scene.pixels[round(tag.y * 56) - 10 : round(tag.y * 56) + 10, round(tag.x * 56) - 10 : round(tag.x * 56) + 10]
            mean = patch.reshape(-1, 3).mean(0)
            nearest = min(world.COLOURS, key=lambda c: np.abs(np.asarray(world.RGB[c]) * world.TAG_VALUE - mean).sum())
            assert nearest == tag.colour
    assert max(counts) == 4 and np.mean(counts) > 3


def test_splits_share_no_digit_and_no_photograph():
    with np.load(importlib.resources.files("imagent_jax.tiny") / "assets/world/digits.npz") as data:
        train, test = data["train_rows"], data["test_rows"]
        assert (len(train), len(test)) == (1300, 497)
        assert sorted([*train, *test]) == list(range(1797))
        assert all(np.isin(range(10), data[f"{split}_labels"]).all() for split in world.SPLITS)
    names = {split: {name for name, _ in world.photographs(split)} for split in world.SPLITS}
    assert len(names["train"]) == 10 and len(names["test"]) == 4
    assert not names["train"] & names["test"]
    rng = np.random.default_rng(1)
    for split in world.SPLITS:
        assert {world.make_scene(rng, split).photo for _ in range(200)} == names[split]


def _solve(task) -> str:
    """The answer, from the question's text and the tags of the images alone."""
    tags = [{tag["colour"]: tag["digit"] for tag in image} for image in task.meta["tags"]]
    named = [(c, int(i)) for c, i in re.findall(r"(\w+) tag in Image (\d)", task.question)]
    colour = re.search(rf"({'|'.join(world.COLOURS)}) tag", task.question)[1]
    having = [n for n, image in enumerate(tags, 1) if colour in image]
    if task.kind == "read":
        ((colour, image),) = named
        return str(tags[image - 1][colour])
    if task.kind == "sum":
        assert len(named) == 2 and named[0][1] != named[1][1]
        return str(sum(tags[image - 1][colour] for colour, image in named))
    if task.kind == "compare":
        a, b = (int(n) for n in re.findall(r"Image (\d)", task.question))
        assert tags[a - 1][colour] != tags[b - 1][colour], "a tie"
        return f"Image {max((a, b), key=lambda n: tags[n - 1][colour])}"
    if task.kind == "find":
        assert having == list(range(1, len(tags) + 1))
        least = int(re.search(r"larger than (\d)", task.question)[1])
        (image,) = (n for n, image in enumerate(tags, 1) if image[colour] > least)
        return f"Image {image}"
    if task.kind == "count":
        return str(len(having))
    assert task.kind == "colour" and len(having) == 1
    return f"Image {having[0]}"


def test_every_answer_follows_from_the_tags(tasks):
    for task in tasks:
        assert _solve(task) == task.answer, task.question
        assert task.answer_type == ("choice" if task.kind in ("compare", "find", "colour") else "number")
        assert all(colour in {tag["colour"] for tag in task.meta["tags"][n - 1]} for n, colour in task.meta["targets"])


def test_meta_describes_the_images_in_their_order():
    task, scenes = world.make_task(np.random.default_rng(5), "train", "sum")
    for encoded, scene, tags in zip(task.images, scenes, task.meta["tags"], strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(encoded)), np.float32)
        assert np.abs(decoded - scene.pixels).mean() < 4
        assert tags == [{"colour": tag.colour, "digit": tag.digit, "x": tag.x, "y": tag.y} for tag in scene.tags]
    (a, red), (b, blue) = task.meta["targets"]
    assert a != b and f"{red} tag in Image {a}" in task.question and f"{blue} tag in Image {b}" in task.question
    assert task.meta["split"] == "train" and world.make_task(np.random.default_rng(5), "test")[0].meta["split"] == "test"
    assert re.fullmatch("tiny_world/[0-9a-f]{16}", task.uid)
    assert task.uid != world.make_task(np.random.default_rng(6), "train", "sum")[0].uid


def test_the_mix_of_kinds_is_the_promised_one(tasks):
    shares = collections.Counter(task.kind for task in tasks)
    promised = {"read": 0.35, "sum": 0.25, "compare": 0.15, "find": 0.10, "count": 0.05, "colour": 0.10}
    assert {kind: shares[kind] / len(tasks) for kind in world.KINDS} == pytest.approx(promised, abs=1e-9)
    rng = np.random.default_rng(2)
    kinds = collections.Counter(world.make_task(rng, "train")[0].kind for _ in range(600))
    assert {kind: kinds[kind] / 600 for kind in world.KINDS} == pytest.approx(promised, abs=0.05)


@pytest.mark.slow(6)
def test_no_image_number_is_favoured_as_answer():
    rng = np.random.default_rng(3)
    for kind in ("find", "colour", "compare"):
        counts = collections.Counter()
        for _ in range(500):
            task, _ = world.make_task(rng, "test", kind)
            counts[len(task.images), task.answer] += 1
        for n in {n for n, _ in counts}:
            total = sum(counts[n, f"Image {i}"] for i in range(1, n + 1))
            for i in range(1, n + 1):
                deviation = np.sqrt((1 / n) * (1 - 1 / n) / total)
                assert abs(counts[n, f"Image {i}"] / total - 1 / n) < 3.5 * deviation, (kind, n, i)


def _views(split: str, count: int, seed: int):
    """Of `count` tags: the region at thumbnail size, the crop as shown, the digit and the colour."""
    rng = np.random.default_rng(seed)
    thumbnails, crops, digits, colours = [], [], [], []
    while len(digits) < count:
        scene = world.make_scene(rng, split)
        height, width = scene.pixels.shape[:2]
        image = Image.open(io.BytesIO(world.encode_image(scene.pixels)))
        small = image.resize(THUMBNAIL[height, width], Image.Resampling.BICUBIC)
        factor, half = small.width / width, 0.22 * min(height, width) / 2
        for tag in scene.tags:
            x, y = tag.x * width, tag.y * height
            box = [v * factor for v in (x - 13, y - 13, x + 13, y + 13)]
            thumbnails.append(np.asarray(small.resize((8, 8), Image.Resampling.BICUBIC, box=box)).ravel() / 255)
            crop = image.crop([round(v) for v in (x - half, y - half, x + half, y + half)])
            centre = np.asarray(crop.resize((84, 84), Image.Resampling.BICUBIC))[24:60, 24:60].max(-1)
            crops.append(hog(centre, orientations=8, pixels_per_cell=(6, 6), cells_per_block=(2, 2)))
            digits.append(tag.digit)
            colours.append(tag.colour)
    return np.array(thumbnails), np.array(crops), np.array(digits), np.array(colours)


@pytest.mark.slow(20)
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_thumbnails_show_colours_but_not_digits_and_crops_show_digits():
    train, test = _views("train", 3000, 0), _views("test", 600, 1)

    def accuracy(model, view, target):
        return model.fit(train[view], train[target]).score(test[view], test[target])

    assert accuracy(KNeighborsClassifier(1), 0, 3) > 0.995
    assert accuracy(KNeighborsClassifier(1), 0, 2) < 0.25
    assert accuracy(LogisticRegression(max_iter=100), 0, 2) < 0.45
    assert accuracy(LogisticRegression(max_iter=60), 1, 2) > 0.90


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.task_at(0, "validation", 0), "no split 'validation'; use one of train, test"),
        (lambda: world.make_task(np.random.default_rng(0), "train", "guess"), "no question kind 'guess'; use one of"),
        (lambda: world.make_scene(np.random.default_rng(0), "train", colours=["red", "red"]), "different colours"),
        (lambda: world.make_scene(np.random.default_rng(0), "train", colours=["pink"]), "different colours of red, green"),
        (lambda: world.make_scene(np.random.default_rng(0), "train", colours=world.COLOURS[:5]), "up to 4 different colours"),
        (lambda: world.make_scene(np.random.default_rng(0), "train", colours=["red"], digits=[10]), "from 0 to 9"),
        (lambda: world.make_scene(np.random.default_rng(0), "train", colours=["red"], digits=[-1]), "from 0 to 9"),
        (lambda: world.make_scene(np.random.default_rng(0), "train", colours=["red"], digits=[1, 2]), "one digit from 0 to 9"),
        (lambda: world.make_scene(np.random.default_rng(0), "validation"), "no split 'validation'"),
        (lambda: world.photographs("validation"), "no split 'validation'"),
        (lambda: world.handwritten_digits("validation"), "no split 'validation'"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_fixed_order_renumbers_images_question_and_answer_alike(tasks):
    """The same images, and the answer that the same rules give for them; where it is an image, always the first."""
    for task in tasks[:200]:
        fixed = world.in_fixed_order(task)
        assert sorted(fixed.images) == sorted(task.images) and len(set(fixed.images)) == len(fixed.images)
        if task.answer_type == "choice":
            assert fixed.answer == "Image 1"
            assert fixed.images[0] == task.images[int(task.answer.split()[1]) - 1]
        else:
            assert fixed.answer == task.answer
        old, new = ([int(n) - 1 for n in re.findall(r"Image (\d+)", t.question)] for t in (task, fixed))
        assert [task.images[n] for n in old] == [fixed.images[n] for n in new]
        for (a, colour), (b, same) in zip(task.meta["targets"], fixed.meta["targets"], strict=True):
            assert colour == same and task.images[a - 1] == fixed.images[b - 1]
            assert task.meta["tags"][a - 1] == fixed.meta["tags"][b - 1]
    assert any(world.in_fixed_order(task).images != task.images for task in tasks)
