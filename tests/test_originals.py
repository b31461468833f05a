"""Originals of given images: the same pixels whether they are in memory or decoded again, and no more memory than allowed."""

import gc
import io
import threading

import numpy as np
import pytest
from PIL import Image, ImageDraw
from task_rows import png

from imagent_jax.chat import Call
from imagent_jax.config import Config, ImagesConfig
from imagent_jax.images import originals
from imagent_jax.images.decode import read_image
from imagent_jax.images.originals import Originals
from imagent_jax.rollout.collect import tool_settings
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import ToolSettings, tools_by_name
from imagent_jax.types import CallStatus, Task

FILES = [png(n, (100, 80)) for n in range(6)]
ONE = 4 * 100 * 80  # bytes that Pillow holds


def opened(kept):
    return [kept.add(data, read_image(data)) for data in FILES]


def in_memory(images):
    return [n for n, image in enumerate(images) if image.pixels is not None]


def test_the_originals_used_last_stay_in_memory_and_all_have_their_pixels():
    images = opened(Originals(3 * ONE))
    assert in_memory(images) == [3, 4, 5]
    images[3].decoded(), images[0].decoded()
    assert in_memory(images) == [0, 3, 5]
    for image, data in zip(images, FILES, strict=True):
        assert image.size == (100, 80) and np.array_equal(image.decoded(), read_image(data))
    assert in_memory(images) == [3, 4, 5]


def test_without_room_nothing_stays_and_a_turned_photograph_is_turned_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)).save(
        file := io.BytesIO(), "JPEG", exif=exif
    )
    image = Originals(0).add(file.getvalue(), read_image(file.getvalue()))
    assert image.pixels is None and image.size == image.decoded().size == (40, 90)


def test_originals_that_nobody_holds_take_no_room():
    kept = Originals(3 * ONE)
    first = opened(kept)
    del first
    gc.collect()
    images = [kept.add(data, read_image(data)) for data in FILES[:3]]
    assert in_memory(images) == [0, 1, 2]


def test_threads_get_the_pixels_that_they_ask_for():
    images, wrong = opened(Originals(2 * ONE)), []

    def read(order):
        for n in order:
            if not np.array_equal(images[n].decoded(), read_image(FILES[n])):
                wrong.append(n)

    threads = [threading.Thread(target=read, args=(np.random.default_rng(n).integers(0, 6, 40),)) for n in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong and len(in_memory(images)) == 2


@pytest.mark.parametrize("room", [0, 4e9])
def test_crops_are_cut_from_the_original_and_hold_no_pixels_of_their_own(monkeypatch, room):
    decoded, real = [], read_image
    monkeypatch.setattr(originals, "read_image", lambda data: decoded.append(data) or real(data))
    settings = ToolSettings(patch_factor=28, confirm_min_pixels=784, confirm_max_pixels=3136, originals=Originals(room))
    environment = ToolEnvironment(tools_by_name(["visual_confirmation"]), settings, ImagesConfig(min_pixels=784, max_pixels=3136))
    environment.reset(Task("a", "?", (FILES[0], FILES[1]), "1"))
    assert [entry.size for entry in environment.images] == [(80, 100)] * 2 and not decoded  # sizes need no pixels
    fork = environment.fork()
    call = {"image": 2, "bbox_2d": [100, 250, 600, 750], "label": "it"}
    result = fork.step(Call("visual_confirmation", call))
    assert result.status == CallStatus.EXECUTED, result
    crop = fork.images[2]
    assert np.array_equal(crop.pixels, np.asarray(read_image(FILES[1]))[20:60, 10:60])
    assert crop.source is environment.images[1].source and (set(decoded) == {FILES[1]} if room == 0 else not decoded)


def test_the_setting_is_the_room(monkeypatch):
    class Processor:
        patch_size, merge_size = 14, 2

    kept = tool_settings(Config().changed({"images.originals_gb": 0.5}), Processor).originals
    assert kept.room == 5e8 and "originals" not in repr(tool_settings(Config(), Processor))  # no part of a remembered verdict


@pytest.mark.parametrize("room", [0, 4e9])
def test_a_tool_that_draws_on_the_pixels_of_an_image_changes_no_other_rollout(room):
    environment = ToolEnvironment(tools_by_name(["visual_confirmation"]), ToolSettings(originals=Originals(room)), ImagesConfig())
    environment.reset(Task("a", "?", (FILES[0],), "1"))
    one, other = environment.fork(1), environment.fork(2)
    pixels = one.images[0].pixels
    ImageDraw.Draw(pixels).rectangle((0, 0, 9, 9), fill="red")
    pixels.putpixel((20, 20), (1, 2, 3))
    pixels.paste("blue", (30, 30, 40, 40))
    assert pixels.getpixel((0, 0)) == (255, 0, 0) and pixels.getpixel((20, 20)) == (1, 2, 3)
    for untouched in (one.images[0].pixels, other.images[0].pixels, environment.images[0].image):
        assert np.array_equal(untouched, read_image(FILES[0]))
