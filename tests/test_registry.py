"""The image registry and box coordinates: every image by number, crops from original pixels."""

import numpy as np
import pytest
from PIL import Image
from scripted_run import execute

from imagent_jax.chat import QWEN
from imagent_jax.images.prepare import smart_resize
from imagent_jax.tools import ImageRegistry, ToolSettings, to_bbox, to_pixels, tools_by_name
from imagent_jax.tools.visual import grow_box
from imagent_jax.types import CallStatus, ToolError

TOOLS = tools_by_name(["visual_reflection", "visual_confirmation"])
SIZES = ((280, 280), (224, 336), (336, 224), (61, 503))
BUDGET = {"min_pixels": 3136, "max_pixels": 4704}


def random_image(rng, size):
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def given(rng, sizes=SIZES):
    registry = ImageRegistry()
    for size in sizes:
        registry.add(random_image(rng, size), shown=smart_resize(*size, 28, 3136, 4704), **BUDGET)
    return registry


def crop(registry, image, bbox, settings=None):
    text = QWEN.render_call("visual_confirmation", {"image": image, "bbox_2d": bbox})
    return execute(TOOLS, text, registry, settings or ToolSettings())


def test_numbers_start_at_one_and_unknown_numbers_name_the_valid_ones():
    registry = given(np.random.default_rng(0))
    assert [entry.number for entry in registry] == [1, 2, 3, 4] and len(registry) == 4
    assert registry[1].size == (280, 280) and registry[4].size == (61, 503)
    for bad in (0, 5, -1, True, "1", 1.0, 10**400):
        with pytest.raises(ToolError, match="image numbers are 1 to 4"):
            registry[bad]
    with pytest.raises(ToolError, match="there is no Image 100000000000; image"):
        registry[10**400]
    with pytest.raises(ToolError, match="there are no images"):
        ImageRegistry()[1]


def test_every_given_and_every_derived_image_can_be_cropped_from_its_original_pixels():
    rng = np.random.default_rng(1)
    settings = ToolSettings(max_images=100, min_box=0.0)
    registry = given(rng)
    for number in range(1, 25):  # 1..4 are given; the others are crops, of crops too, made on the way
        pixels = np.asarray(registry[number].image)
        bbox = [120, 200, 870, 960]
        result = crop(registry, number, bbox, settings)
        assert result.status is CallStatus.EXECUTED
        (made,) = result.images
        entry = registry[made]
        left, top, right, bottom = entry.box
        assert np.array_equal(np.asarray(entry.image), pixels[top:bottom, left:right])
        height, width = pixels.shape[:2]
        assert (left, right) == (round(0.12 * width), round(0.87 * width))
        assert (top, bottom) == (round(0.2 * height), round(0.96 * height))
        assert entry.parent == number and made == len(registry)
        assert result.parts == [f"Image {made}: crop of Image {number}", made]


def test_a_crop_of_a_crop_reaches_the_pixels_of_the_given_image():
    registry = given(np.random.default_rng(2), [(1000, 1000)])
    crop(registry, 1, [200, 300, 700, 800])  # 500 x 500 pixels
    crop(registry, 2, [100, 0, 500, 600])
    pixels = np.asarray(registry[1].image)
    assert np.array_equal(np.asarray(registry[3].image), pixels[300:600, 250:450])


def test_the_size_shown_is_the_size_that_preparing_with_the_stored_budget_gives():
    rng = np.random.default_rng(3)
    settings = ToolSettings(max_images=200)
    registry = given(rng)
    for _ in range(60):
        x, y = np.sort(rng.uniform(0, 1000, 2)), np.sort(rng.uniform(0, 1000, 2))
        crop(registry, int(rng.integers(1, 5)), [x[0], y[0], x[1], y[1]], settings)
    execute(TOOLS, QWEN.render_call("visual_reflection", {"images": [1, 2, 5], "resolution": "high"}), registry, settings)
    assert len(registry) == 66
    for entry in registry:
        assert entry.shown == smart_resize(*entry.size, 28, entry.min_pixels, entry.max_pixels)
        assert entry.shown[0] % 28 == 0 and entry.shown[1] % 28 == 0


@pytest.mark.parametrize("space", ["relative_1000", "absolute"])
def test_boxes_survive_both_coordinate_spaces_within_a_pixel(space):
    rng = np.random.default_rng(4)
    for _ in range(500):
        size = tuple(int(side) for side in rng.integers(20, 1000, 2))
        registry = given(rng, [(4, 4)])
        registry.add(Image.new("RGB", size[::-1]), shown=smart_resize(*size, 28, 3136, 12544))
        entry = registry[2]
        (left, right), (top, bottom) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in size[::-1])
        box = tuple(int(edge) for edge in (left, top, right, bottom))
        exact = to_bbox(box, entry, space)
        assert to_pixels(exact, entry, space) == box
        if space == "relative_1000":
            whole = [round(edge) for edge in exact]
            if whole[0] < whole[2] and whole[1] < whole[3]:
                assert np.abs(np.subtract(to_pixels(whole, entry, space), box)).max() <= 1


def test_absolute_boxes_are_pixels_of_the_image_as_shown():
    registry = given(np.random.default_rng(5), [(224, 336)])  # shown at 56 x 84, a quarter of the side
    assert registry[1].shown == (56, 84)
    settings = ToolSettings(coordinates="absolute")
    (made,) = crop(registry, 1, [21, 14, 84, 56], settings).images
    assert registry[made].box == (84, 56, 336, 224)
    assert registry[made].shown == smart_resize(168, 252, 28, 7056, 9408)
    error = crop(registry, 1, [21, 14, 85, 56], settings)
    assert error.parts == ["Error: bbox_2d must lie inside 84 x 56 pixels"]
    for x1, y1, x2, y2 in [(21, 14, 84, 57), (-1, 14, 84, 56), (21, -1, 84, 56)]:
        assert crop(registry, 1, [x1, y1, x2, y2], settings).parts == error.parts
    with pytest.raises(ToolError, match="area must lie inside 84 x 56 pixels"):
        to_pixels([0, 0, 85, 1], registry[1], "absolute", "area")


def test_small_boxes_grow_about_their_centre_and_stay_inside():
    rng = np.random.default_rng(6)
    for _ in range(2000):
        height, width = (int(side) for side in rng.integers(1, 400, 2))
        x, y = np.sort(rng.integers(0, width + 1, 2)), np.sort(rng.integers(0, height + 1, 2))
        if x[0] == x[1] or y[0] == y[1]:
            continue
        fraction = float(rng.uniform(0, 1))
        left, top, right, bottom = grow_box((int(x[0]), int(y[0]), int(x[1]), int(y[1])), (height, width), fraction)
        assert 0 <= left <= x[0] and x[1] <= right <= width and 0 <= top <= y[0] and y[1] <= bottom <= height
        assert right - left >= fraction * width and bottom - top >= fraction * height
        if left > 0 and right < width:
            assert abs((left + right) - (x[0] + x[1])) <= 1
    assert grow_box((140, 140, 142, 142), (280, 280), 0.1) == (127, 127, 155, 155)
    assert grow_box((0, 278, 2, 280), (280, 280), 0.1) == (0, 252, 28, 280)
    assert grow_box((10, 20, 200, 210), (280, 280), 0.1) == (10, 20, 200, 210)


def test_a_box_smaller_than_a_pixel_is_still_a_crop():
    registry = given(np.random.default_rng(7), [(40, 40)])
    settings = ToolSettings(min_box=0.0)
    for bbox, box in [([500.0, 500.0, 500.1, 500.1], (20, 20, 21, 21)), ([999.9, 0, 1000, 0.1], (39, 0, 40, 1))]:
        (made,) = crop(registry, 1, bbox, settings).images
        assert registry[made].box == box and registry[made].image.size == (1, 1)


def test_lineage_says_where_an_image_comes_from():
    registry = given(np.random.default_rng(8), [(280, 280), (224, 336)])
    crop(registry, 2, [0, 0, 500, 500])
    crop(registry, 3, [0, 0, 500, 500])
    high = execute(
        TOOLS, QWEN.render_call("visual_reflection", {"images": [1, 2], "resolution": "high"}), registry, ToolSettings()
    )
    assert [entry.describe() for entry in registry] == [
        "Image 1",
        "Image 2",
        "Image 3: crop of Image 2",
        "Image 4: crop of Image 3",
        "Image 5: larger view of Image 1",
    ]
    assert [entry.parent for entry in registry] == [None, None, 2, 3, 1]
    assert [entry.box for entry in registry] == [None, None, (0, 0, 168, 112), (0, 0, 84, 56), None]
    assert high.parts == ["Image 5: larger view of Image 1", 5, "Image 2", 2]  # 2 is as large as 84 x 84 allows
    number = registry.add(Image.new("L", (28, 28)), shown=(28, 28), origin="plot")
    assert registry[number].describe() == "Image 6: plot" and registry[number].image.mode == "RGB"
    low = execute(TOOLS, QWEN.render_call("visual_reflection", {"images": [3, 5]}), registry, ToolSettings())
    assert low.parts == ["Image 7: smaller view of Image 3", 7, "Image 1", 1]  # 5 is at "low" what 1 is
    assert [entry.number for entry in registry] == list(range(1, 8))


def test_an_image_shown_again_at_its_size_keeps_its_number_and_a_view_is_made_once():
    registry = given(np.random.default_rng(9), [(280, 280), (280, 280)])
    settings = ToolSettings()
    low = execute(TOOLS, QWEN.render_call("visual_reflection", {"images": [2, 1]}), registry, settings)
    assert low.parts == ["Image 2", 2, "Image 1", 1] and len(registry) == 2
    call = QWEN.render_call("visual_reflection", {"images": [2], "resolution": "high"})
    first, second = (execute(TOOLS, call, registry, settings) for _ in range(2))
    assert first.images == second.images == [3] and len(registry) == 3
    assert registry[3].shown == (84, 84) and registry[3].source is registry[2].source
    both = QWEN.render_call("visual_reflection", {"images": [2, 3], "resolution": "high"})
    assert execute(TOOLS, both, registry, settings).images == [3]
    twice = ImageRegistry()
    for _ in range(2):  # a task may show one picture twice
        twice.add(registry[1].image, shown=(56, 56), **BUDGET)
    again = QWEN.render_call("visual_reflection", {"images": [2, 1]})
    assert execute(TOOLS, again, twice, settings).images == [2, 1]
    crop(registry, 3, [250, 250, 750, 750])
    assert np.array_equal(np.asarray(registry[4].image), np.asarray(registry[2].image)[70:210, 70:210])


def test_bad_registrations_are_refused_with_a_reason():
    registry = given(np.random.default_rng(10), [(20, 30)])
    image = Image.new("RGB", (5, 5))
    with pytest.raises(TypeError, match="takes PIL images, got ndarray"):
        registry.add(np.zeros((5, 5, 3)), shown=(28, 28))
    with pytest.raises(ValueError, match=r"positive \(height, width\), got \(0, 28\)"):
        registry.add(image, shown=(0, 28))
    with pytest.raises(ValueError, match=r"positive \(height, width\), got \(28, 0\)"):
        registry.add(image, shown=(28, 0))
    with pytest.raises(ValueError, match="needs the parent"):
        registry.add(image, shown=(28, 28), box=(0, 0, 5, 5))
    with pytest.raises(ValueError, match=r"\(0, 0, 31, 5\) is not inside Image 1, 30 x 20 pixels"):
        registry.add(image, shown=(28, 28), parent=1, box=(0, 0, 31, 5))
    for box in [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 5, 21), (5, 0, 5, 5), (0, 5, 5, 5), (6, 0, 5, 5)]:
        with pytest.raises(ValueError, match="is not inside Image 1, 30 x 20 pixels"):
            registry.add(image, shown=(28, 28), parent=1, box=box)
    with pytest.raises(ToolError, match="there is no Image 7; the only image is 1"):
        registry.add(image, shown=(28, 28), parent=7)
    assert len(registry) == 1
    registry.add(image, shown=(28, 28), parent=1, box=(0, 0, 30, 20))  # all of it
    assert registry[2].box == (0, 0, 30, 20) and len(registry) == 2


def test_pixels_are_read_when_an_image_is_registered(tmp_path):
    random_image(np.random.default_rng(12), (20, 30)).save(tmp_path / "a.png")
    registry, pixels = ImageRegistry(), np.asarray(Image.open(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        registry.add(image, shown=(28, 56))
    assert np.array_equal(np.asarray(registry[1].image), pixels) and registry[1].shown == (28, 56)


def test_forks_share_pixels_and_grow_apart():
    registry = given(np.random.default_rng(11), [(280, 280)])
    forks = [registry.fork() for _ in range(2)]
    crop(forks[0], 1, [0, 0, 500, 500])
    crop(forks[1], 1, [500, 500, 1000, 1000])
    assert len(registry) == 1 and forks[0][1].source is forks[1][1].source
    assert forks[0][2].box == (0, 0, 140, 140) and forks[1][2].box == (140, 140, 280, 280)
    registry.adopt(forks[0])
    assert registry[2].box == (0, 0, 140, 140)
    with pytest.raises(ValueError, match="changed since it was forked"):
        registry.adopt(forks[1])
    with pytest.raises(ValueError, match="changed since it was forked"):
        registry.adopt(given(np.random.default_rng(11), [(280, 280)]))  # fewer images, and others
    early = registry.fork()
    crop(registry, 1, [0, 0, 300, 300])
    with pytest.raises(ValueError, match="changed since it was forked"):
        registry.adopt(early)  # what was added since would be lost
    later = registry.fork()
    crop(later, 2, [0, 0, 900, 900])
    registry.adopt(later)
    later.add(later[1].image, shown=(28, 28))
    assert (len(registry), len(later)) == (4, 5)  # the two grow apart again


def test_crops_and_views_keep_no_pixels_of_their_own():
    """64 wide crops, crops of crops and views of a picture share its pixels; what a tool has drawn on has its own."""
    registry = given(np.random.default_rng(13), [(300, 400)])
    settings = ToolSettings(max_images=99)
    whole = np.asarray(registry[1].image)
    for i in range(64):
        crop(registry, 1 + i % 3, [i, 2 * i, 900 + i, 870 + 2 * i], settings)
    execute(TOOLS, QWEN.render_call("visual_reflection", {"images": [2, 1], "resolution": "high"}), registry, settings)
    assert len(registry) > 65 and all(entry.source is registry[1].source for entry in registry)
    for entry in [*registry][1:]:
        parent = np.asarray(registry[entry.parent].pixels)
        left, top, right, bottom = entry.box or (0, 0, parent.shape[1], parent.shape[0])
        assert np.array_equal(np.asarray(entry.pixels), parent[top:bottom, left:right]) and entry.size == (
            bottom - top,
            right - left,
        )
    assert np.array_equal(np.asarray(registry[1].pixels), whole)
    drawn = registry[2].image
    drawn.putpixel((3, 3), (1, 2, 3))
    number = registry.add(drawn, shown=(28, 28), parent=2)
    box = (0, 0, 10, 10)
    piece = registry.add(drawn.crop(box), shown=(28, 28), parent=2, box=box)
    for new in (number, piece):
        assert registry[new].source is not registry[1].source and registry[new].pixels.getpixel((3, 3)) == (1, 2, 3)
