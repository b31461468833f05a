"""Tokenizer and image settings of a checkpoint, read from its Hugging Face files without torch."""

import re
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from imagent_jax.images.prepare import PreparedImage, image_settings, prepare_image, prepare_to
from imagent_jax.model.families import read_folder
from imagent_jax.types import Markup

_FIXED = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "resample": int(Image.Resampling.BICUBIC), "rescale_factor": 1 / 255,
}  # fmt: skip


class Processor:
    """Converts text to token ids and images to patches.

    Equals transformers' processor of the checkpoint, except that patches stay uint8; `vision.normalise` normalises them later.
    """

    def __init__(self, tokenizer, settings: dict):
        """Check the image settings and look up the vision markers.

        Args:
            settings: content of a `preprocessor_config.json`.
        Raises:
            ValueError: an unsupported image setting, or a tokenizer without Qwen's vision markers.
        """
        self.tokenizer = tokenizer
        for name, honoured in _FIXED.items():
            if settings.get(name, honoured) != honoured:
                raise ValueError(
                    f"preprocessor_config.json sets {name} to {settings[name]!r}; Qwen2-VL images need {honoured!r}."
                )
        size = settings.get("size") or {}
        self.min_pixels = settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self.max_pixels = settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        self.patch_size = settings.get("patch_size", 14)
        self.merge_size = settings.get("merge_size", 2)
        markers = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
        self.image_token_id, self.vision_start_id, self.vision_end_id = (self._marker_id(marker) for marker in markers)
        whole = tokenizer.backend_tokenizer
        self._markers = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._markers, key=len, reverse=True)
        self._at_markers = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._plain = Tokenizer(whole.model)  # the same vocabulary, without markers
        self._plain.normalizer, self._plain.pre_tokenizer = whole.normalizer, whole.pre_tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Processor":
        """Return the processor of a folder with tokenizer files and `preprocessor_config.json` (or `processor_config.json`).

        Raises:
            ValueError: a file is missing or unreadable (named), the tokenizer does not match the folder's config.json (if it
                exists), or see `__init__`.
        """
        folder = Path(folder)
        settings = image_settings(folder)
        if not (folder / "tokenizer_config.json").is_file():
            raise ValueError(f"{folder} holds no tokenizer_config.json; name a folder with a complete Qwen2-VL processor.")
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            raise ValueError(f"{folder} holds no tokenizer.json; name a folder with a complete Qwen2-VL processor.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise ValueError(f"The tokenizer files in {folder} cannot be read ({error}); download them again.") from error
        processor = cls(tokenizer, settings)
        if (folder / "config.json").is_file():
            processor._check_vocabulary(folder)
        return processor

    def _marker_id(self, marker: str) -> int:
        ids = self.tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"The tokenizer has no single token {marker}; use a Qwen2-VL tokenizer.")
        return ids[0]

    def _check_vocabulary(self, folder: Path) -> None:
        cfg, last = read_folder(folder), max(self.tokenizer.get_vocab().values())
        if last >= cfg.text.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has ids up to {last}, but the embedding has {cfg.text.vocab_size} rows; "
                "use the tokenizer that came with these weights."
            )
        if self.image_token_id != cfg.image_token_id:
            raise ValueError(
                f"{folder}: <|image_pad|> is {self.image_token_id} to the tokenizer and {cfg.image_token_id} to config.json; "
                "use the tokenizer that came with these weights."
            )

    def encode(self, *texts: str) -> list[int]:
        """Return the token ids of texts that follow each other, tokenised as one text. No special tokens are added.

        Markers become single tokens in `Markup` only. In any other text they are tokenised like words, as if the vocabulary
        had no markers.

        Raises:
            ValueError: a text has a lone surrogate, which is no character.
        """
        ids, plain = [], ""
        for text in texts:
            for piece in self._at_markers.split(text) if isinstance(text, Markup) else [text]:
                if isinstance(text, Markup) and piece in self._markers:
                    ids += [*self._encode_plain(plain), self._markers[piece]]
                    plain = ""
                else:
                    plain += piece
        return ids + self._encode_plain(plain)

    def _encode_plain(self, text: str) -> list[int]:
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"the text has a lone surrogate {lone[0]!a}, half of a character; remove it or write it whole.")
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """Return the text of token ids, markers included, without cleanup of spaces."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_texts(self, vocab_size: int) -> list[str]:
        """Return the text of each token id alone. Bytes of a cut character become U+FFFD; ids without a token, ""."""
        return self.tokenizer.backend_tokenizer.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)

    def unsampled_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Return the ids that a policy must not sample: placeholders of images and videos, and ids without a token.

        Args:
            vocab_size: V, the rows of the embedding.
        """
        placeholders = {self._markers.get(marker) for marker in ("<|image_pad|>", "<|video_pad|>")}
        tokens = set(self.tokenizer.get_vocab().values()) - placeholders
        return tuple(i for i in range(vocab_size) if i not in tokens)

    def prepare(self, image: Image.Image, min_pixels: int | None = None, max_pixels: int | None = None) -> PreparedImage:
        """Resize an image to a pixel budget (default: the checkpoint's) and cut it into patches."""
        return prepare_image(
            image,
            min_pixels=min_pixels or self.min_pixels,
            max_pixels=max_pixels or self.max_pixels,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
        )

    def prepare_to(self, image: Image.Image, size: tuple[int, int]) -> PreparedImage:
        """Resize an image to a given (height, width) and cut it into patches."""
        return prepare_to(image, size, patch_size=self.patch_size, merge_size=self.merge_size)

    def image_ids(self, grid: tuple[int, int]) -> list[int]:
        """Return the token ids of an image: vision start, one placeholder per merge unit, vision end."""
        count = grid[0] * grid[1] // self.merge_size**2
        return [self.vision_start_id, *[self.image_token_id] * count, self.vision_end_id]
