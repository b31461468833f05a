"""Trajectories on disk, whole: what was shown, said, called and paid, token by token, and every image once."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagent_jax.config import Config
from imagent_jax.distributed import processes as hosts
from imagent_jax.model.processor import Processor
from imagent_jax.rl.mask import mask_tables
from imagent_jax.runs.folder import RunFolder
from imagent_jax.scoring import score
from imagent_jax.types import ImageEntry, TokenKind, Trajectory

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}  # what browsers show
ORIENTATION = 0x0112  # the EXIF tag


class TrajectoryLog:
    """Writes `trajectories/<name>-<step>.jsonl`, one record a line, and `trajectories/images/<content hash>.<suffix>`.

    A record's `images` lists the trajectory's numbered images: given ones by file, crops and views by what they are made
    of. Its `tokens` are columns: `ids`, `text`, `kind` (a digit each, `TokenKind`), `kept` (1 where the token trains; missing
    in evaluations), `logprob`. A run of image placeholders is one entry; `repeat` has its length by index.
    """

    def __init__(self, folder: RunFolder, processor: Processor, cfg: Config):
        self.folder, self.processor, self.limit = folder, processor, cfg.run.log_trajectories
        self.action, self.trajectory, _ = mask_tables(cfg.mask)
        self.images = folder.path / "trajectories" / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self.files = {path.stem: path.name for path in self.images.glob("*.*") if path.suffix != ".part"}
        self.names: dict[bytes, str] = {}  # of the group being logged: its rollouts share their images
        self.pieces: dict[int, str] = {}

    def write(self, step: int, groups: Sequence[Sequence[Trajectory]], rewards: Sequence[Sequence[dict]] | None = None,
              advantages: np.ndarray | None = None, name: str = "train") -> None:  # fmt: skip
        """Logs whole groups, at least one, of about `run.log_trajectories` trajectories (0: none).

        Args:
            rewards: reward parts of every trajectory, and `advantages` [N G]; None in an evaluation, where nothing trains.
        """
        if not self.limit or not hosts.is_writer():
            return
        records = []
        for n, group in enumerate(groups[: max(1, self.limit // len(groups[0]))]):
            if group[0].images is None:  # another process has its images
                break
            self.names.clear()
            for g, t in enumerate(group):
                paid = {} if rewards is None else rewards[n][g]
                records.append(self.record(t, paid, None if advantages is None else float(advantages[n, g])))
        self.folder.log_trajectories(step, records, name)

    def record(self, t: Trajectory, rewards: dict[str, float], advantage: float | None = None) -> dict[str, Any]:
        """A trajectory as JSON."""
        right = score(t.answer, t.task.answer, t.task.answer_type) == 1.0
        return {
            "task": t.task.uid, "kind": t.task.kind, "question": t.task.question, "truth": t.task.answer,
            "rollout": t.rollout, "answer": t.answer, "right": right, "end": t.end.name, "error": t.error,
            "dropped": advantage is not None and not bool(self.trajectory[t.end]),
            "rewards": rewards, "advantage": advantage, "length": len(t.ids),
            "images": self._images(t.task.images, t.images),
            "turns": [{"text": turn.text, "call": turn.call and _call(turn.call)} for turn in t.turns],
            "tokens": self._tokens(t, advantage),
        }  # fmt: skip

    def _tokens(self, t: Trajectory, advantage: float | None) -> dict[str, Any]:
        pad = (t.kind == TokenKind.OBSERVATION) & (t.ids == self.processor.image_token_id)
        first = np.flatnonzero(~(pad & np.concatenate([[False], pad[:-1]])))
        counts = np.diff(np.append(first, len(t.ids)))
        ids, kind = t.ids[first].tolist(), t.kind[first]
        columns = {
            "ids": ids, "text": self._texts(ids), "kind": "".join(map(str, kind.tolist())),
            "logprob": [round(x, 4) for x in t.logprobs[first].tolist()],
            "repeat": {str(i): int(counts[i]) for i in np.flatnonzero(counts > 1)},
        }  # fmt: skip
        if advantage is not None:
            kept = self.action[int(advantage > 0)][kind] & self.trajectory[t.end]
            columns["kept"] = "".join(map(str, kept.astype(int).tolist()))
        return columns

    def _texts(self, ids: list[int]) -> list[str]:
        """The text of each token; the first of several that make one character has it, the others have ""."""
        texts = [self._text(i) for i in ids]
        i = 0
        while i < len(ids):
            if "\ufffd" in texts[i]:
                for stop in range(i + 2, min(i + 8, len(ids)) + 1):
                    if "\ufffd" not in (whole := self.processor.decode(ids[i:stop])):
                        texts[i:stop] = [whole] + [""] * (stop - i - 1)
                        i = stop - 1
                        break
            i += 1
        return texts

    def _text(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = self.processor.decode([token])
        return self.pieces[token]

    def _images(self, given: Sequence[bytes], images: Sequence[ImageEntry]) -> list[dict[str, Any]]:
        return [_lineage(entry) | self._source(entry, given, images) for entry in images]

    def _source(self, entry: ImageEntry, given: Sequence[bytes], images: Sequence[ImageEntry]) -> dict[str, str]:
        """The file of an image; nothing for what its parent (and box) give again to the pixel."""
        if entry.number <= len(given):
            data = given[entry.number - 1]
            if data not in self.names:
                self.names[data] = self._save(data, entry.image)
            return {"file": self.names[data]}
        if entry.parent is not None:
            parent = images[entry.parent - 1].image
            if entry.image is parent:
                return {}
            if entry.box and entry.image.tobytes() == parent.crop(entry.box).tobytes():
                return {}
        return {"file": self._save(_png(entry.image), entry.image)}

    def _save(self, data: bytes, pixels: Image.Image) -> str:
        """Writes an image file unless it is there; a browser shows the file just as the registry holds its pixels."""
        stem = hashlib.sha256(data).hexdigest()[:16]
        if stem in self.files:
            return self.files[stem]
        with Image.open(io.BytesIO(data)) as image:
            plain = image.mode in ("RGB", "L") and image.getexif().get(ORIENTATION, 1) == 1
            suffix = SUFFIXES.get(image.format) if plain else None
        name = self.files[stem] = f"{stem}.{suffix or 'png'}"
        _write(self.images / name, data if suffix else _png(pixels))
        return name


def _call(call) -> dict[str, Any]:
    said = [part for part in call.parts if isinstance(part, str)]
    return {"status": call.status.name, "name": call.name, "arguments": call.arguments, "images": call.images,
            "said": said, "error": call.error}  # fmt: skip


def _lineage(entry: ImageEntry) -> dict[str, Any]:
    facts = {"size": [entry.image.width, entry.image.height], "shown": [entry.shown[1], entry.shown[0]]}  # width, height
    if entry.parent is not None:
        facts |= {"parent": entry.parent, "origin": entry.origin}
    return facts | ({"box": list(entry.box)} if entry.box else {})


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)  # a killed run leaves no half image under a final name
