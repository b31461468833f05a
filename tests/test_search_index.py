"""The search index: BM25 against its formula, tokens of several languages, hostile rows, builds that fail or are stopped."""

import concurrent.futures
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from imagent_jax.index import main
from imagent_jax.tools.search import Index
from imagent_jax.tools.search.hits import clean

ROOT = Path(__file__).parent.parent
SMALL = [
    {"id": "a", "title": "Café Réunion", "text": "The cats of the island drink coffee."},
    {"id": "b", "contents": '"Tower "Eiffel" of Paris"\nIron, 330 metres tall.\nPainted every seven years.'},
    {"id": "c", "title": "长城", "text": "万里长城位于中国北方,全长两万多公里。"},
    {"id": "d", "title": "猫", "text": "猫(ﾈｺ)は人と暮らす動物です。"},
    {"id": 5, "text": "Ｆｕｌｌ－ｗｉｄｔｈ １２３"},
    {"id": "f", "contents": "A first line without quotes\nis text."},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    assert main([str(write(folder / "corpus.jsonl", SMALL)), str(folder / "index")]) == 0
    return Index(folder / "index")


def ids(index: Index, query: str, k: int = 3) -> list[str]:
    return [hit.id for hit in index.search(query, k)]


# ---- ranking ------------------------------------------------------------------------------------------------------------


def bm25(corpus: list[list[str]], query: list[str]) -> list[float]:
    """The formula of Robertson and Zaragoza with Lucene's idf: k1 = 1.2, b = 0.75, numerators times k1 + 1."""
    mean, scores = sum(map(len, corpus)) / len(corpus), []
    for tokens in corpus:
        counts, score = Counter(tokens), 0.0
        for term in query:
            holds = sum(term in other for other in corpus)
            idf = math.log(1 + (len(corpus) - holds + 0.5) / (holds + 0.5))
            score += idf * 2.2 * counts[term] / (counts[term] + 1.2 * (0.25 + 0.75 * len(tokens) / mean))
        scores.append(score)
    return scores


WORDS = [f"{a}{b}{c}" for a in "bdgkmp" for b in "aou" for c in "bdgkmp"]  # no English ending, so no stems


@pytest.mark.parametrize("seed", range(3))
def test_ranking_is_bm25_by_its_formula_with_ties_in_the_order_of_ids(seed, tmp_path):
    rng = np.random.default_rng(seed)
    odds = rng.zipf(1.5, len(WORDS)).astype(float) ** -1
    names = rng.permutation(300).tolist()  # ids are in another order than rows
    corpus = [rng.choice(WORDS, rng.integers(1, 41), p=odds / odds.sum()).tolist() for _ in names]
    corpus[100:140] = [corpus[100]] * 40  # equal scores
    rows = [{"id": f"n{name:03}", "text": " ".join(tokens)} for name, tokens in zip(names, corpus, strict=True)]
    main([str(write(tmp_path / "c.jsonl", rows)), str(tmp_path / "index")])
    index = Index(tmp_path / "index")
    for query in [corpus[100][:3], *(rng.choice(WORDS, n).tolist() for n in (1, 2, 5, 9))]:
        scores = bm25(corpus, query)
        best = sorted((-round(s, 4), row["id"]) for s, row in zip(scores, rows, strict=True) if s > 0)
        for k in (1, 7, 300):
            found = index.search(" ".join(query), k)
            assert [hit.score for hit in found] == pytest.approx([-score for score, _ in best[:k]], abs=2e-4)
            assert found == sorted(found, key=lambda hit: (-hit.score, hit.id))
    same = [row["id"] for row, tokens in zip(rows, corpus, strict=True) if tokens == corpus[100]]
    for k in (1, 7, 39, 40):
        assert ids(index, " ".join(corpus[100]), k) == sorted(same)[:k]


def test_long_passages_score_as_lucene_rounds_their_length(tmp_path):
    """Lengths over 40 are stored in one byte: within one eighth of the length."""
    rows = [{"id": str(n), "text": " ".join(["bab"] + ["dod"] * (n - 1))} for n in (50, 100, 1000)]
    main([str(write(tmp_path / "c.jsonl", rows)), str(tmp_path / "index")])
    exact = bm25([row["text"].split() for row in rows], ["bab"])
    found = Index(tmp_path / "index").search("bab", 3)
    assert [hit.id for hit in found] == ["50", "100", "1000"]
    assert [hit.score for hit in found] == pytest.approx(exact, rel=0.125)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("cat", ["a"]),  # English stems
        ("CAFE reunion", ["a"]),  # case and accents
        ("長城", ["c"]),  # 城 is the same in traditional characters
        ("中国的长城", ["c"]),
        ("城", ["c"]),  # one character inside of a word
        ("北方", ["c"]),
        ("方北", ["c"]),  # its characters, not the pair
        ("動物", ["d"]),
        ("ネコ", ["d"]),  # NFKC
        ("full-width 123", ["5"]),
        ("Eiffel", ["b"]),
        ("... ?!", []),
        ("zebra", []),
        ('title:cat AND (coffee^2 OR "the', ["a"]),  # no query language
        ("cat\ud800\x00coffee", ["a"]),
    ],
)
def test_chinese_and_english_queries_find_their_passages(small, query, found):
    assert ids(small, clean(query)) == found


def test_pairs_of_characters_rank_above_the_same_characters_apart(tmp_path):
    rows = [{"id": "apart", "text": "方便的北京"}, {"id": "pair", "text": "中国北方的"}]
    main([str(write(tmp_path / "c.jsonl", rows)), str(tmp_path / "index")])
    assert ids(Index(tmp_path / "index"), "北方") == ["pair", "apart"]


def test_titles_are_found_and_come_back_in_both_forms(small):
    [eiffel] = small.search("eiffel tower", 1)
    assert (eiffel.title, eiffel.text) == ('Tower "Eiffel" of Paris', "Iron, 330 metres tall.\nPainted every seven years.")
    assert eiffel.contents == SMALL[1]["contents"]
    [plain] = small.search("first quotes", 1)
    assert (plain.id, plain.title, plain.text) == ("f", "", SMALL[5]["contents"])


def test_threads_at_once_find_what_one_finds(small):
    queries = ["cat coffee", "长城", "eiffel tower", "first line"] * 50
    alone = [small.search(query, 3) for query in queries]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: small.search(query, 3), queries)) == alone


def test_the_index_is_mapped_into_memory_and_nothing_is_written_to_it(small):
    def state() -> list:
        return sorted((file.name, file.stat().st_mtime_ns) for file in small.path.iterdir())

    before = state()
    again = Index(small.path)
    assert ids(again, "cat") == ["a"] and state() == before
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if str(small.path) in line}
    assert {file.suffix for file in mapped} >= {".idx", ".term", ".store"}


def test_a_user_who_may_not_write_an_index_can_read_it(small):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        path = shutil.copytree(small.path, Path(folder) / "index")
        path.chmod(0o555)
        code = "import os, sys, tantivy; from imagent_jax.tools.search import Index; os.getuid() or os.setuid(65534); "
        code += "print(os.access(sys.argv[1], os.W_OK), Index(sys.argv[1]).passages)"
        ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT)
        path.chmod(0o755)
    assert ended.stdout == "False 6\n", ended.stderr


# ---- building -----------------------------------------------------------------------------------------------------------


def test_parquet_and_several_files_are_one_corpus(tmp_path, capsys):
    rows = [{"id": str(n), "title": f"bab {n}", "text": "dod"} for n in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "one.parquet")
    two = write(tmp_path / "two.jsonl", [{"id": "last", "contents": '"gag"\nkok'}])
    assert main([str(tmp_path / "one.parquet"), str(two), str(tmp_path / "index")]) == 0
    assert re.match(r".*index: 41 passages, 0\.\d MB, \d+\.\d s \([\d,]+ passages a second\)\n", capsys.readouterr().out)
    index = Index(tmp_path / "index")
    assert ids(index, "17") == ["17"] and ids(index, "gag") == ["last"]


BAD = """{"id": "a", "title": "T", "text": "fine"}
{"id": "b", "text": 3}
not json

{"id": "a", "title": "T", "text": "again"}
{"id": "c"}
{"title": "T", "text": "x"}
{"id": "d", "text": "\\ud800"}
{"id": true, "text": "x"}
{"id": "e", "title": " ", "text": "\\u0000"}
["f"]
{"id": "g", "title": 4, "text": "x"}
{"id": "h", "title": null, "text": "also fine"}
"""


def test_bad_rows_are_named_by_line_and_no_index_is_left(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text(BAD)
    assert main([str(tmp_path / "c.jsonl"), str(tmp_path / "index")]) == 2
    lines = capsys.readouterr().err.splitlines()
    named = {int(n): said for n, said in (re.search(r"line (\d+): (.*)", line).groups() for line in lines[:-1])}
    assert list(named) == [2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert "no text" in named[2] and "not JSON" in named[3] and "half a character" in named[8] and "empty" in named[10]
    assert named[5] == f"the id 'a' is also that of {tmp_path}/c.jsonl, line 1; give every passage its own"
    assert "no id" in named[7] and "no id" in named[9] and "no text" in named[12]
    assert lines[-1] == "error: 10 rows are no passages; mend them, or leave them out with --skip-bad."
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]


def test_bad_rows_are_left_out_by_choice(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text(BAD)
    assert main([str(tmp_path / "c.jsonl"), str(tmp_path / "index"), "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert "2 passages, 10 rows left out" in said.out and len(said.err.splitlines()) == 10
    index = Index(tmp_path / "index")
    assert ids(index, "fine") == ["a", "h"] and ids(index, "again") == []


def test_a_line_of_a_megabyte_and_a_word_of_a_megabyte_are_indexed(tmp_path):
    rows = [{"id": "long", "text": "bab dod " * 125_000 + "gag"}, {"id": "word", "text": "x" * 2**20 + " kok"}]
    assert main([str(write(tmp_path / "c.jsonl", rows)), str(tmp_path / "index")]) == 0
    index = Index(tmp_path / "index")
    assert ids(index, "gag") == ["long"] and ids(index, "kok") == ["word"] and ids(index, "x" * 2**20) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.jsonl", "out"], "The corpus none.jsonl does not exist; write rows"),
        (["c.csv", "out"], "The corpus c.csv ends in '.csv'; use one of .jsonl, .parquet."),
        (["c.jsonl", "there"], "there exists; name another folder, or remove it first."),
        (["empty.jsonl", "out"], "The corpus has no passages; an index needs one at least."),
        (["--serve", "there"], "there is no index; build one with `imagent index CORPUS.jsonl OUT`."),
        (["--serve", "none"], "none is no index; build one with `imagent index CORPUS.jsonl OUT`."),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", SMALL)
    (tmp_path / "c.csv").write_text("id,text")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {sentence}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [[], ["c.jsonl"], ["--serve", "i", "c.jsonl", "out"]])
def test_a_corpus_and_a_folder_or_an_index_must_be_named(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "name a corpus and a new folder, or --serve and an index" in capsys.readouterr().err


@pytest.mark.slow(6)
def test_ctrl_c_leaves_no_half_index(tmp_path):
    with (tmp_path / "c.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": n, "text": f"bab {n} dod " * 30}) + "\n" for n in range(60_000))
    command = [sys.executable, "-m", "imagent_jax.index", str(tmp_path / "c.jsonl"), str(tmp_path / "index")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".index.*/*.lock")):  # the writer is at work
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1] == "Stopped; no index was written."
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]


def spoilt(facts: str):
    return lambda folder: (folder / "imagent_index.json").write_text(facts)


def longest(folder: Path, suffix: str) -> Path:
    return max(folder.glob(f"*{suffix}"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "imagent_index.json").unlink(), "is no index; build one"),
        (spoilt("{"), "is no index; build one"),
        (spoilt("[]"), "is of another version; build it again"),
        (spoilt('{"format": 1, "tokeniser": "other", "passages": 6}'), "is of another version; build it again"),
        (lambda folder: (folder / "meta.json").unlink(), "cannot be read ("),
        (lambda folder: longest(folder, ".store").unlink(), "cannot be read ("),
        (lambda folder: longest(folder, ".idx").write_bytes(b""), "cannot be read ("),
    ],
)
def test_a_wrong_or_half_folder_is_refused(small, spoil, sentence, tmp_path):
    folder = shutil.copytree(small.path, tmp_path / "index")
    assert Index(folder).passages == 6
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        Index(folder)
    assert str(folder) in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_folder_that_lacks_passages_is_refused(small, tmp_path):
    folder = shutil.copytree(small.path, tmp_path / "index")
    facts = json.loads((folder / "imagent_index.json").read_text())
    (folder / "imagent_index.json").write_text(json.dumps(facts | {"passages": 7}))
    with pytest.raises(ValueError, match="holds 6 of 7 passages; build it again"):
        Index(folder)


def test_without_the_extra_one_sentence_says_what_to_install(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tantivy", None)
    sentence = 'tantivy is not installed; run pip install "imagent-jax[search]".'
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Index(small.path)
    assert main([str(write(tmp_path / "c.jsonl", SMALL)), str(tmp_path / "index")]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n" and not (tmp_path / "index").exists()


def test_the_extra_is_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [name.split(">")[0] for name in extras["search"]] == ["tantivy"]


def test_every_form_of_a_character_is_one_token(small):
    composed, apart = (unicodedata.normalize(form, "Réunion") for form in ("NFC", "NFD"))
    assert composed != apart and ids(small, composed) == ids(small, apart) == ["a"]
