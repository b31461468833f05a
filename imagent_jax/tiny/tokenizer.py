"""The tiny base's tokenizer: a sentencepiece BPE model, stored in Hugging Face's form with Qwen's markers.

Made for short sequences in which what the policy decides stands alone: a digit, a colour and a coordinate (a multiple
of 25) are each one token, joined to nothing around them, while the words between them are few long pieces. No piece
goes on after a line break, so text cut there, as prompts and observations are, gives the same tokens as the whole.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from imagent_jax.images.prepare import CLIP_MEAN, CLIP_STD
from imagent_jax.tiny.encyclopaedia import RELATIONS, SYLLABLES
from imagent_jax.tiny.world import COLOURS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<answer>", "</answer>")
COORDINATES = tuple(str(n) for n in range(25, 1001, 25))
"""Numbers that are one token; every other number is one token a digit."""

_NUMBER = r"(?<![0-9A-Za-z_])(?:1000|[1-9](?:00|25|50|75)|25|50|75)(?![0-9A-Za-z_])|(?<![A-Za-z_])[0-9](?![A-Za-z_])"
_COLOUR = "|".join(COLOURS)
_FIRST, _LATER = "|".join(s.capitalize() for s in SYLLABLES), "|".join(SYLLABLES)
VALUES = rf"(?:{_NUMBER}|\b(?:{_COLOUR})\b)"
"""What is a token of its own: numbers and colours."""
_WORDS = [*RELATIONS, *(relation for relations in RELATIONS.values() for relation in relations)]
NAMED_VALUES = (
    rf"(?:{_NUMBER}|(?<=[a-z])[0-9](?![0-9A-Za-z_])|\b(?:{_COLOUR})(?![A-Za-z])|\b(?:{'|'.join(_WORDS)})\b|\b(?:{_FIRST})(?=(?:{_LATER}){{2}}\b)"
    rf"|(?<=\b(?:{_FIRST}))(?:{_LATER})(?=(?:{_LATER})\b)|(?<=\b(?:{_FIRST})(?:{_LATER}))(?:{_LATER})\b)"
)
"""The same for the tool worlds: also the two halves of "red7", the words of the encyclopaedia, and the syllables of its names."""
_LINE_END = r"(?<=\n)(?=[^\n])"
_MERGES = [("0", "0"), ("5", "0"), ("2", "5"), ("7", "5"), ("0", "00")]  # pairs that build COORDINATES, in this order
_STAND_IN = {"\n": "\ue000", " ": "\ue001"}
"""What sentencepiece sees for a line break and a space: it ends a sentence at one, and no piece with the other."""

CHAT_TEMPLATE = """\
{%- set image = '<|vision_start|><|image_pad|><|vision_end|>' %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- image if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {%- if tools and loop.first and message.role == 'system' %}
        {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
        {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
        {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, ' }}
        {{- '"arguments": <args-json-object>}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def pieces_apart(text: str, values: str = VALUES) -> Iterator[str]:
    """Cuts text where no token may reach across: around markers and values, and after line breaks."""
    markers = "|".join(re.escape(marker) for marker in (*SPECIAL, *MARKERS, "<image>"))
    for part in re.split(f"{markers}|({values})|{_LINE_END}", text):
        if part:
            yield part


def build_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int = 1024, values: str = VALUES) -> None:
    """Trains the tokenizer on `texts` and writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
    `tokenizer.model` (sentencepiece's own; see `_STAND_IN`) and `preprocessor_config.json` into `folder`.

    Args:
        folder: where to; it exists.
        texts: conversations; `<image>` in them stands for an image and is not learned.
        vocab_size: pieces that sentencepiece may learn, 256 bytes among them.
        values: `VALUES` or `NAMED_VALUES`.
    """
    trained = _train(texts, vocab_size, values)
    (folder / "tokenizer.model").write_bytes(trained)
    model = sentencepiece.SentencePieceProcessor(model_proto=trained)
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    for character, stand_in in _STAND_IN.items():
        pieces = [piece.replace(stand_in, character) for piece in pieces]
    names = [s for low in SYLLABLES for s in (low, low.capitalize())] if values == NAMED_VALUES else []
    pieces += [p for p in ("00", "000", *COORDINATES, *names) if p not in pieces]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(vocab), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(values), "isolated"), pre_tokenizers.Split(Regex(r"\n+"), "merged_with_previous")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write(folder / "special_tokens_map.json", roles)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": 3136,
            "max_pixels": 4704,
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    )


def _train(texts: Sequence[str], vocab_size: int, values: str) -> bytes:
    """Sentencepiece BPE on the pieces of `texts`; returns its model file."""
    table = str.maketrans(_STAND_IN)
    characters = "".join(map(chr, range(33, 127))) + "".join(_STAND_IN.values())
    sentences = (piece.translate(table) for text in texts for piece in pieces_apart(text, values))
    written = io.BytesIO()  # a file's path would be kept in the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        required_chars=characters,
        split_by_whitespace=False,
        split_by_number=False,
        split_by_unicode_script=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentencepiece_length=64,
        character_coverage=1.0,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
        num_threads=2,
        max_sentence_length=100000,
        shuffle_input_sentence=False,
    )
    return written.getvalue()


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges behind the pieces, in sentencepiece's order; a piece may come from any two pieces that make it up."""
    merges = list(_MERGES)
    for piece in sorted(vocab, key=vocab.__getitem__):
        if len(piece) > 1 and not piece.startswith("<0x") and piece != "<unk>":
            parts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
            merges += sorted(set(parts) - set(_MERGES), key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
