"""A checkpoint's own tokenizer and image settings, read from its files, without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rounding import assert_rounded
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from imagent_jax.model.families import families, read_folder
from imagent_jax.model.processor import Processor
from imagent_jax.model.vision import normalise
from imagent_jax.tiny.base import base_folder
from imagent_jax.types import Markup

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TEXTS = [
    "Which image has the larger digit on its red tag, Image 1 or Image 3?",
    "<|im_start|>user\nImage 1: <|vision_start|><|image_pad|><|vision_end|>\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    '<tool_call>\n{"name": "visual_confirmation", "arguments": {"image": 2, "bbox_2d": [10, 20, 300, 400]}}\n</tool_call>',
    "<tool_response>\nImage 4: crop of Image 2\n</tool_response><|im_end|>",
    "  spaces  and\n\n\nlines \t tabs, 1234567890, Grüße, 图像, 🙂, it's . , ! ?",
    "<|not_a_marker|> <tool_calls> <|im_end|",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer with Qwen's markers, and image settings, in Hugging Face's files."""
    folder = tmp_path_factory.mktemp("processor")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    Qwen2TokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(folder)
    write_images(folder, min_pixels=3136, max_pixels=9408)
    return folder


def write_images(folder, **changed):
    settings = json.loads(Qwen2VLImageProcessorPil().to_json_string()) | changed
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def copy_without(folder, tmp_path, *names):
    for path in folder.iterdir():
        if path.name not in names:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_reference_and_decode_to_the_text(folder, processor, text):
    reference = AutoTokenizer.from_pretrained(folder)
    ids = processor.encode(Markup(text))
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert processor.decode(ids) == processor.decode(np.asarray(ids, np.int32)) == text


def test_every_marker_is_one_token_with_a_name(processor):
    names = {"<|vision_start|>": "vision_start_id", "<|vision_end|>": "vision_end_id", "<|image_pad|>": "image_token_id"}
    assert names.keys() < set(SPECIAL)
    assert all([getattr(processor, name)] == processor.encode(Markup(marker)) for marker, name in names.items())
    assert all(len(processor.encode(Markup(marker))) == 1 for marker in (*MARKERS, *SPECIAL))


def test_an_image_takes_one_placeholder_for_four_patches(processor):
    image = processor.prepare(Image.new("RGB", (90, 60)))
    ids = processor.image_ids(image.grid)
    assert ids == [processor.vision_start_id, *[processor.image_token_id] * (len(image.patches) // 4), processor.vision_end_id]


def test_image_settings_come_from_the_file(folder, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 310, 3), dtype=np.uint8))
    for changed in (
        {"size": {"shortest_edge": 3136, "longest_edge": 20000}},
        {"min_pixels": 60000, "max_pixels": 90000, "size": None},
        {"patch_size": 16, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]},
        {"size": {"shortest_edge": 3136, "longest_edge": 20000}, "max_pixels": 8000},
    ):
        write_images(copy_without(folder, tmp_path), **changed)
        ours = Processor.from_pretrained(tmp_path).prepare(image)
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)([image])
        assert theirs["image_grid_thw"].tolist() == [[1, *ours.grid]]
        (tmp_path / "config.json").write_text(json.dumps(families()["qwen2_vl"].sizes["Qwen2-VL-2B"]))
        patches = normalise(read_folder(tmp_path).vision, ours.patches)
        (tmp_path / "config.json").unlink()
        assert_rounded(patches, theirs["pixel_values"], 4)


def test_a_budget_of_the_caller_goes_before_the_files(processor):
    image = Image.new("RGB", (400, 400))
    assert processor.prepare(image).size == (84, 84)
    assert processor.prepare(image, max_pixels=4704).size == (56, 56)
    assert processor.prepare(image, min_pixels=12000, max_pixels=13000).size == (112, 112)
    small = Image.new("RGB", (28, 28))
    assert processor.prepare(small).size == (56, 56) and processor.prepare(small, min_pixels=9000).size == (112, 112)


def test_what_the_image_settings_leave_out_is_qwens(processor):
    plain = Processor(processor.tokenizer, {})
    assert (plain.min_pixels, plain.max_pixels, plain.patch_size, plain.merge_size) == (3136, 1003520, 14, 2)
    own = Processor(processor.tokenizer, {"patch_size": 16, "merge_size": 1, "min_pixels": 5, "size": {"shortest_edge": 6,
                                          "longest_edge": 7000}})  # fmt: skip
    assert (own.min_pixels, own.max_pixels, own.patch_size, own.merge_size) == (5, 7000, 16, 1)
    image = own.prepare(Image.new("RGB", (64, 48)))
    assert image.grid == (3, 4) and own.image_ids(image.grid).count(own.image_token_id) == 12


def test_the_newer_single_processor_file_is_read_too(folder, processor, tmp_path):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    copy_without(folder, tmp_path, "preprocessor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert Processor.from_pretrained(tmp_path).max_pixels == processor.max_pixels == 9408


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"holds no {name}; name a folder with a complete Qwen2-VL processor"):
        Processor.from_pretrained(copy_without(folder, tmp_path, name))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_an_unreadable_file_is_one_sentence(folder, tmp_path, name):
    (copy_without(folder, tmp_path, name) / name).write_text("{ not json")
    with pytest.raises(ValueError, match="download (it|them) again"):
        Processor.from_pretrained(tmp_path)


def test_a_tokenizer_without_the_markers_is_refused(folder, tmp_path):
    text = (folder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|picture|>")
    (copy_without(folder, tmp_path) / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"no single token <\|image_pad\|>; use a Qwen2-VL tokenizer"):
        Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize("changed", [{"resample": 2}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_an_image_setting_that_would_not_be_honoured_is_refused(folder, tmp_path, changed):
    write_images(copy_without(folder, tmp_path), **changed)
    with pytest.raises(ValueError, match=f"sets {next(iter(changed))} to"):
        Processor.from_pretrained(tmp_path)


def test_an_embedding_of_just_the_tokenizers_size_is_enough(folder, processor, tmp_path):
    copy_without(folder, tmp_path)
    config = json.loads((base_folder() / "config.json").read_text()) | {"image_token_id": processor.image_token_id}
    last = max(processor.tokenizer.get_vocab().values())
    for rows in (last + 1, last):
        config["text_config"]["vocab_size"] = rows
        (tmp_path / "config.json").write_text(json.dumps(config))
        if rows > last:
            assert Processor.from_pretrained(tmp_path).image_token_id == processor.image_token_id
        else:
            with pytest.raises(ValueError, match=f"has ids up to {last}, but the embedding has {last} rows"):
                Processor.from_pretrained(tmp_path)


def test_it_works_where_torch_is_not_installed(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from PIL import Image\n"
        "from imagent_jax.model.processor import Processor\n"
        f"p = Processor.from_pretrained({str(folder)!r})\n"
        "print(len(p.encode('<|im_start|>user')), p.prepare(Image.new('RGB', (60, 90))).patches.shape)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[0].endswith("(24, 588)"), out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 300}, "the tokenizer has ids up to .*, but the embedding has 300 rows; use the tokenizer that came"),
        ({"image_token_id": 5}, r"<\|image_pad\|> is \d+ to the tokenizer and 5 to config.json; use the tokenizer that came"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path, changes, sentence):
    copy_without(folder, tmp_path)
    config = json.loads((base_folder() / "config.json").read_text())
    config["text_config"]["vocab_size"] = changes.pop("vocab_size", 1088)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=sentence) as error:
        Processor.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) == 1
