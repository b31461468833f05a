"""Decoding: what every kind of image looks like to the policy, wherever it comes from."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from imagent_jax.agent import encoded
from imagent_jax.config import ImagesConfig
from imagent_jax.images.decode import read_image, read_pil, to_rgb
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import ToolSet, ToolSettings
from imagent_jax.types import Task

RNG = np.random.default_rng(0)
RGBA = Image.fromarray(RNG.integers(0, 256, (24, 36, 4), np.uint8))
RGB = RGBA.convert("RGB")
RAMP = np.linspace(0, 63_600, 64 * 64).astype(np.uint16).reshape(64, 64)


def saved(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(orientation, image=RGB, kind="JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif, **options)


def assert_same(found, expected):
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))


def palette(**info):
    image = RGB.convert("P")
    image.info |= info
    return image


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (RGB, "PNG"), (RGB.convert("L"), "PNG"), (RGB.convert("1"), "PNG"), (palette(), "PNG"), (RGB.convert("CMYK"), "JPEG"),
        (RGB.convert("CMYK"), "TIFF"), (RGB.convert("YCbCr"), "JPEG"), (RGBA, "PNG"), (RGBA, "WEBP"), (RGBA.convert("LA"), "PNG"),
        (palette(transparency=3), "PNG"), (palette(transparency=3), "GIF"), (palette(transparency=bytes(range(256))), "PNG"),
    ],
)  # fmt: skip
def test_modes_of_8_bits_look_as_in_transformers(image, kind):
    """Its image processor lays transparency over white; `load_image` would drop it."""
    data = saved(image, kind)
    file = Image.open(io.BytesIO(data))
    assert_same(read_image(data), convert_to_rgb(file, return_numpy=True))


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LAB", "HSV", "I;16B"])
def test_modes_that_no_file_opens_in_are_converted_too(mode):
    if mode == "La":
        source = RGBA.convert("LA").convert("La")
        expected = convert_to_rgb(source.convert("LA"), return_numpy=True)
    elif mode == "PA":
        source = RGBA.convert("PA")
        expected = convert_to_rgb(source, return_numpy=True)
    elif mode == "I;16B":
        source, expected = Image.new(mode, (4, 4), 257 * 9), np.full((4, 4, 3), 9)
    else:
        source = RGBA.convert(mode) if mode == "RGBa" else Image.fromarray(np.full((8, 8, 3), (90, 130, 60), np.uint8), mode)
        expected = convert_to_rgb(source.convert("RGBA"), return_numpy=True) if mode == "RGBa" else source.convert("RGB")
    assert source.mode == mode
    assert_same(to_rgb(source), expected)


def test_transparent_pixels_are_white_whatever_colour_they_hide():
    hidden = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert read_image(saved(hidden, "PNG")).getcolors() == [(4, (255, 255, 255))]
    half = read_image(saved(Image.new("LA", (1, 1), (100, 51)), "PNG"))  # a fifth of 100 over white
    assert half.getpixel((0, 0)) == (224, 224, 224)
    keyed = saved(Image.new("RGB", (2, 2), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert read_image(keyed).getcolors() == [(4, (255, 255, 255))]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_to_8(kind):
    image = read_image(saved(Image.fromarray(RAMP), kind))
    expected = np.round(RAMP / 65535 * 255)
    assert np.array_equal(np.asarray(image)[..., 0], expected) and image.mode == "RGB"
    assert round(np.asarray(image).mean()) == 124
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(RAMP)))[..., 2], expected)


def test_16_bits_reach_from_black_to_white_and_may_have_a_transparent_value():
    ends = Image.fromarray(np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535]], np.uint16))
    assert np.asarray(to_rgb(ends))[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]
    keyed = read_image(saved(ends, "PNG", transparency=129))
    assert np.asarray(keyed)[0, :, 0].tolist() == [0, 0, 255, 254, 255, 255]


def tiff(bits, photometric, data, width) -> bytes:
    """A grey TIFF file of one row, written by hand: Pillow writes no 12 bits and no 16 bits whose white is zero."""
    tags = [(256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 122), (277, 3, 1),
            (278, 3, 1), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + data


@pytest.mark.parametrize(
    ("bits", "photometric", "data", "expected"),
    [
        (8, 0, bytes([0, 85, 170, 255]), [255, 170, 85, 0]),
        (12, 1, bytes.fromhex("000555aaafff"), [0, 85, 170, 255]),
        (16, 1, bytes.fromhex("00005555aaaaffff"), [0, 85, 170, 255]),
        (16, 0, bytes.fromhex("00005555aaaaffff"), [255, 170, 85, 0]),
    ],
)
def test_grey_of_a_tiff_file_is_scaled_by_its_bits_and_inverted_where_white_is_zero(bits, photometric, data, expected):
    file = tiff(bits, photometric, data, 4)
    assert np.asarray(read_image(file))[0, :, 1].tolist() == expected
    with Image.open(io.BytesIO(file)) as opened:
        assert_same(read_pil(opened), read_image(file))


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_32_bits_are_refused_because_their_white_is_unknown(dtype, mode):
    image = Image.fromarray(RAMP.astype(dtype))
    for read in (lambda: read_image(saved(image, "TIFF")), lambda: read_pil(image), lambda: to_rgb(image)):
        with pytest.raises(ValueError, match=rf"32-bit numbers \(mode {mode}\), whose white is not known: convert it to 8 bits"):
            read()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert read_image(data).getcolors() == [(400, (255, 0, 0))]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_file_is_turned_as_transformers_and_viewers_turn_it(tmp_path, orientation, kind):
    (tmp_path / "photo").write_bytes(data := with_orientation(orientation, kind=kind))
    image, expected = read_image(data), load_image(str(tmp_path / "photo"))
    assert image.size == ((24, 36) if orientation > 4 else (36, 24))
    assert_same(image, expected)
    with Image.open(tmp_path / "photo") as opened:
        assert_same(read_pil(opened), expected)


def test_transparency_and_16_bits_are_turned_too():
    assert_same(
        read_image(with_orientation(6, RGBA, "PNG")), read_image(saved(RGBA, "PNG")).transpose(Image.Transpose.ROTATE_270)
    )
    deep = Image.fromarray(RAMP[:20])
    turned = read_image(with_orientation(8, deep, "PNG"))
    assert_same(turned, to_rgb(deep).transpose(Image.Transpose.ROTATE_90))


def test_damaged_exif_data_counts_as_none():
    data = saved(RGB, "WEBP", exif=b"Exif\0\0no facts", lossless=True)
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    assert_same(read_image(data), RGB)


@pytest.mark.parametrize("data", [b"", b"no image", saved(RGB, "PNG")[:-60], saved(RGB, "JPEG")[:-200]])
def test_what_does_not_decode_is_one_kind_of_error(data):
    with pytest.raises(ValueError, match="^it does not decode$"):
        read_image(data)


@pytest.mark.parametrize(
    "image",
    [RGB, RGBA, RGB.convert("CMYK"), RGB.convert("HSV"), palette(transparency=3), Image.fromarray(RAMP)],
    ids=lambda i: i.mode,
)
def test_an_agent_takes_pil_images_of_any_mode_and_turns_them(image):
    before = image.tobytes(), image.mode
    assert_same(read_image(encoded(image)), to_rgb(image))
    assert (image.tobytes(), image.mode) == before
    with Image.open(io.BytesIO(data := with_orientation(6))) as opened:
        assert_same(read_image(encoded(opened)), read_image(data))
        assert opened.size == (36, 24)
    with Image.open(io.BytesIO(data := saved(Image.fromarray(RAMP), "PPM"))) as opened:
        assert_same(read_image(encoded(opened)), read_image(data))


def test_boxes_are_in_turned_pixels():
    environment = ToolEnvironment(ToolSet([]), ToolSettings(), ImagesConfig())
    environment.reset(Task("a", "?", (with_orientation(6),), "1"))
    (entry,) = environment.images
    assert entry.size == (36, 24) and entry.shown[0] > entry.shown[1]
