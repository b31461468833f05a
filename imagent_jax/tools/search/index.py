"""A local index: BM25 by tantivy, memory-mapped, so that the processes of a machine share it.

Tokens are words without case and accents, English ones stemmed, and the characters and pairs of characters of Chinese,
Japanese and Korean. BM25 has k1 = 1.2 and b = 0.75; as in Lucene, the length of a passage of more than 40 tokens is rounded.
"""

import importlib
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from imagent_jax.tools.search.hits import Hit, ranked

FORMAT = {"format": 1, "tokeniser": "words, English stems, pairs of CJK characters (1)"}
"""What an index folder must say of itself. It changes with what is stored and with how text becomes tokens."""
FACTS = "imagent_index.json"
HEAP = 256 * 2**20
"""Bytes in which passages are collected before they are written."""
TIES = 1024
"""Most passages among which equal scores are put in the order of ids."""
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+")


class Index:
    """An index folder, read-only.

    Raises:
        ValueError: the folder is no complete index, another version wrote it, or tantivy is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        try:
            facts = json.loads((self.path / FACTS).read_text())
        except (OSError, ValueError):
            raise ValueError(f"{self.path} is no index; build one with `imagent index CORPUS.jsonl OUT`.") from None
        if not isinstance(facts, dict) or any(facts.get(name) != value for name, value in FORMAT.items()):
            raise ValueError(f"The index {self.path} is of another version; build it again with `imagent index`.")
        self._tantivy, self._analyzer = _tantivy(), _analyzer()
        try:
            index = self._open()
            self._schema, self._searcher = index.schema, index.searcher()
            self.passages = self._searcher.num_docs
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The index {self.path} cannot be read ({reason}); build it again with `imagent index`.") from None
        if self.passages != facts.get("passages"):
            raise ValueError(
                f"The index {self.path} holds {self.passages} of {facts.get('passages')} passages; build it again with "
                "`imagent index`."
            )

    def _open(self) -> Any:
        """Open the folder by links: tantivy locks files of the folder that it opens, but the index may be of another user."""
        links = Path(tempfile.mkdtemp(prefix="imagent_index_"))
        try:
            for file in self.path.iterdir():
                if file.suffix != ".lock":
                    (links / file.name).symlink_to(file.absolute())
            return self._tantivy.Index.open(str(links))
        finally:  # renamed first, since a thread of tantivy may be about to lock it again
            shutil.rmtree(links.rename(f"{links}.old"), ignore_errors=True)

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Backend.search`. A query without a word finds nothing."""
        terms, tantivy = self._analyzer.analyze(words(query)), self._tantivy
        if not terms:
            return []
        any_of = [(tantivy.Occur.Should, tantivy.Query.term_query(self._schema, "words", term)) for term in terms]
        found, limit = [], k + 1
        while True:  # until the last that is looked at is worse than the k-th, or nothing is left
            found = self._searcher.search(tantivy.Query.boolean_query(any_of), limit, count=False).hits
            # the same sum in another order differs in the last digits
            scores = [round(score, 4) for score, _ in found]
            if len(found) < limit or scores[-1] < scores[k - 1] or limit >= TIES:
                break
            limit = min(4 * limit, TIES)
        hits = [
            Hit(*json.loads(self._searcher.doc(place)["passage"][0]), score)
            for score, (_, place) in zip(scores, found, strict=True)
            if score >= scores[min(k, len(scores)) - 1]
        ]
        return ranked(hits, k)


def build(passages: Iterable[tuple[str, str, str]], out: Path) -> None:
    """Write the index folder `out` of passages (id, title, text), which are read one at a time. If it is interrupted, nothing is
    left behind.

    Raises:
        ValueError: there are no passages, or tantivy is not installed.
        OSError: `out` exists, or cannot be written.
    """
    tantivy = _tantivy()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        count = _write(tantivy, passages, part)
        if not count:
            raise ValueError("The corpus has no passages; an index needs one at least.")
        (part / FACTS).write_text(json.dumps(FORMAT | {"passages": count}))
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)  # some are written for this user only
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write(tantivy: ModuleType, passages: Iterable[tuple[str, str, str]], folder: Path) -> int:
    schema = tantivy.SchemaBuilder().add_bytes_field("passage", stored=True)
    schema = schema.add_text_field("words", tokenizer_name="words", index_option="freq").build()
    index = tantivy.Index(schema, str(folder))
    index.register_tokenizer("words", _analyzer())
    writer, count = index.writer(HEAP, 1), 0  # one thread: the same corpus makes the same index
    try:
        for name, title, text in passages:
            document = tantivy.Document()
            document.add_bytes("passage", json.dumps([name, title, text], ensure_ascii=False).encode())
            document.add_text("words", words(f"{title}\n{text}"))
            writer.add_document(document)
            count += 1
        writer.commit()
    finally:
        writer.wait_merging_threads()  # nothing is written after this
    return count


def words(text: str) -> str:
    """Return a text with its characters in their usual form, and Chinese, Japanese and Korean as characters and pairs of them."""
    return _CJK.sub(_pairs, unicodedata.normalize("NFKC", text))


def _pairs(run: re.Match) -> str:
    return " ".join(["", *run[0], *map("".join, zip(run[0], run[0][1:], strict=False)), ""])


def _analyzer() -> Any:
    tantivy = _tantivy()
    made = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.remove_long(64))
    made = made.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold())
    return made.filter(tantivy.Filter.stemmer("english")).build()


def _tantivy() -> ModuleType:
    try:
        return importlib.import_module("tantivy")
    except ImportError:
        raise ValueError('tantivy is not installed; run pip install "imagent-jax[search]".') from None
