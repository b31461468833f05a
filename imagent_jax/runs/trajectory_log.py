"""Trajectory log: complete trajectories token by token, with calls, rewards, and every image stored once."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from imagent_jax.config import Config
from imagent_jax.distributed import processes
from imagent_jax.model.processor import Processor
from imagent_jax.rl.mask import mask_tables
from imagent_jax.types import ImageEntry, TokenKind, Trajectory

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}  # formats that browsers show
ORIENTATION = 0x0112  # the EXIF tag


class LogFolder(Protocol):
    """A folder that keeps records of trajectories, such as that of a run (`RunFolder`)."""

    path: Path

    def log_trajectories(self, step: int, records: list[dict[str, Any]], name: str = "train") -> None: ...


class TrajectoryLog:
    """Writes `trajectories/<name>-<step>.jsonl`, one record per line, and `trajectories/images/<content hash>.<suffix>`.

    A record's `images` lists the trajectory's numbered images: given images by file, crops and views by their parent. Its
    `facts` are those of the task, where it has some (`Task.meta`). Its
    `tokens` are columns: `ids`, `text`, `kind` (one digit each, `TokenKind`), `kept` (1: the token trains; absent in
    evaluations), `logprob`. A run of image placeholders is one entry; `repeat` holds its length by index.
    """

    def __init__(self, folder: LogFolder, processor: Processor, cfg: Config):
        self.folder, self.processor, self.limit = folder, processor, cfg.run.log_trajectories
        self.tables = mask_tables(cfg.mask)
        self.images = folder.path / "trajectories" / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self.files = {path.stem: path.name for path in self.images.glob("*.*") if path.suffix != ".part"}
        self.names: dict[bytes, str] = {}  # of the group being logged, whose rollouts share images
        self.pieces: dict[int, str] = {}

    def write(
        self,
        step: int,
        groups: Sequence[Sequence[Trajectory]],
        rewards: Sequence[Sequence[dict]] | None = None,
        advantages: np.ndarray | None = None,
        name: str = "train",
    ) -> None:
        """Log whole groups, at least one, of about `run.log_trajectories` trajectories in total (0: none).

        Args:
            rewards: rewards by name of every trajectory; None in an evaluation.
            advantages: [N G]; None in an evaluation.
        """
        if not self.limit or not processes.is_writer():
            return
        records = []
        for n, group in enumerate(groups[: max(1, self.limit // len(groups[0]))]):
            if group[0].images is None:  # its images are in another process
                break
            self.names.clear()
            for g, t in enumerate(group):
                paid = {} if rewards is None else rewards[n][g]
                records.append(self.record(t, paid, None if advantages is None else float(advantages[n, g])))
        self.folder.log_trajectories(step, records, name)

    def record(self, t: Trajectory, rewards: dict[str, float], advantage: float | None = None) -> dict[str, Any]:
        """Return a trajectory as a JSON-serialisable dictionary."""
        return {
            "task": t.task.uid,
            "kind": t.task.kind,
            "question": t.task.text,
            "truth": " | ".join(t.task.answers),
            "rollout": t.rollout,
            "answer": t.answer,
            "right": t.right,
            "end": t.end.name,
            "error": t.error,
            "dropped": advantage is not None and not bool(self.tables.trajectory[t.end]),
            "rewards": rewards,
            "advantage": advantage,
            "length": len(t.ids),
            "images": self._images(t.task.images, t.images or ()),
            "turns": [{"text": turn.text, "call": turn.call and _call(turn.call)} for turn in t.turns],
            "tokens": self._tokens(t, advantage),
        } | ({"facts": _plain_facts(t.task.meta)} if t.task.meta else {})

    def _tokens(self, t: Trajectory, advantage: float | None) -> dict[str, Any]:
        pad = (t.kind == TokenKind.OBSERVATION) & (t.ids == self.processor.image_token_id)
        first = np.flatnonzero(~(pad & np.concatenate([[False], pad[:-1]])))
        counts = np.diff(np.append(first, len(t.ids)))
        ids, kind = t.ids[first].tolist(), t.kind[first]
        columns = {
            "ids": ids,
            "text": self._texts(ids),
            "kind": "".join(map(str, kind.tolist())),
            "logprob": [round(x, 4) for x in t.logprobs[first].tolist()],
            "repeat": {str(i): int(counts[i]) for i in np.flatnonzero(counts > 1)},
        }
        if advantage is not None:
            kept = self.tables.action[int(advantage > 0)][kind] & self.tables.trajectory[t.end]
            columns["kept"] = "".join(map(str, kept.astype(int).tolist()))
        return columns

    def _texts(self, ids: list[int]) -> list[str]:
        """Return the text of each token. If several tokens form one character, the first has it and the others have ""."""
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
        """Return the file of an image; nothing if its parent (and box) reproduce it exactly."""
        if entry.number <= len(given):
            data = given[entry.number - 1]
            if data not in self.names:
                self.names[data] = self._save(data, entry.pixels)
            return {"file": self.names[data]}
        if entry.parent is not None and entry.source is images[entry.parent - 1].source:
            return {}
        return {"file": self._save(_png(entry.pixels), entry.pixels)}

    def _save(self, data: bytes, pixels: Image.Image) -> str:
        """Write an image file unless it exists; the file displays exactly as the registry's pixels."""
        stem = hashlib.sha256(data).hexdigest()[:16]
        if stem in self.files:
            return self.files[stem]
        with Image.open(io.BytesIO(data)) as image:
            suffix = SUFFIXES.get(image.format) if _plain(image) else None
        name = self.files[stem] = f"{stem}.{suffix or 'png'}"
        _write(self.images / name, data if suffix else _png(pixels))
        return name


def _plain_facts(meta: dict[str, Any]) -> dict[str, Any]:
    """Return facts as JSON holds them. An environment may have put anything into them."""
    return json.loads(json.dumps(meta, default=str, skipkeys=True))


def _plain(image: Image.Image) -> bool:
    """Return whether a browser shows an image file exactly as `read_image` decodes it."""
    try:
        upright = image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # damaged EXIF data
        return False
    still = getattr(image, "n_frames", 1) == 1
    return upright and still and image.mode in ("RGB", "L") and "transparency" not in image.info


def _call(call) -> dict[str, Any]:
    said = [part for part in call.parts if isinstance(part, str)]
    return {
        "status": call.status.name,
        "name": call.name,
        "arguments": call.arguments,
        "images": call.images,
        "said": said,
        "error": call.error,
    }


def _lineage(entry: ImageEntry) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": [*entry.size[::-1]], "shown": [*entry.shown[::-1]]}  # width, height
    if entry.parent is not None:
        facts |= {"parent": entry.parent, "origin": entry.origin}
    elif entry.origin:
        facts["origin"] = entry.origin  # made of no other image
    return facts | ({"box": list(entry.box)} if entry.box else {})


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)  # a killed run leaves no incomplete file under the final name
