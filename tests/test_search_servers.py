"""Servers of search that misbehave, Serper, and recordings."""

import concurrent.futures
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from search_servers import GOOD, called, item, raw, result_of, says, scripted, tools_of

from imagent_jax.config import SearchConfig
from imagent_jax.tools import CallPool
from imagent_jax.tools.search import Hit, SearchError, open_backend
from imagent_jax.tools.search.remote import Serper, Server
from imagent_jax.types import CallStatus

ROOT = Path(__file__).parent.parent


def test_search_r1s_server_is_asked_for_scores_and_ranked_with_ties_by_id():
    answer = result_of(
        item(1, id="b", contents='"B"\nsecond'), item(2.5, id=7, title="Seven", text="first", contents="x"),
        item(1, id="a", contents="no title"), item(0.5, id="z", contents='"Z"\nlast'),
    )  # fmt: skip
    with scripted(says(answer)) as server:
        hits = Server(server.url, 5.0).search("two words", 3)
    assert hits == [Hit("7", "Seven", "first", 2.5), Hit("a", "", "no title", 1.0), Hit("b", "B", "second", 1.0)]
    [(path, _, body)] = server.seen
    assert (path, body) == ("/retrieve", {"queries": ["two words"], "topk": 3, "return_scores": True})


def test_documents_of_search_r1s_servers_may_lack_id_and_score():
    twice = {"title": "Tower", "text": "A tower.", "contents": '"Tower"\nA tower.'}
    with scripted(says(result_of(item(3.5, **twice), item(3.5, contents="Other."), item(1.0, **twice)))) as server:
        first, second, last = Server(server.url, 5.0).search("x", 3)
    tower = first if first.title else second
    assert {first.text, second.text} == {"A tower.", "Other."} and len({first.id, second.id, last.id}) == 2
    assert (tower.title, tower.text, tower.score) == ("Tower", "A tower.", 3.5) and len(tower.id) == 16
    assert (last.id, last.score) == (tower.id, 1.0)
    bare = [{"document": {"contents": f'"T"\n{i}'}} for i in range(3)]
    with scripted(says({"result": [bare]})) as server:
        hits = Server(server.url, 5.0).search("x", 2)
    assert [(hit.text, hit.score) for hit in hits] == [("0", 1.0), ("1", 0.5)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(GOOD, 500), "answered 500"),
        (says(GOOD, 201), "answered 201"),
        (says({"detail": "bad \ud800\x00 request"}, 422), "answered 422"),
        (says(b"{"), "JSONDecodeError"),
        (says(b"\xff"), "UnicodeDecodeError"),
        (says(b"[" * 100_000), "RecursionError"),
        (says([]), "no list of scored documents"),
        (says({"result": []}), "no list of scored documents"),
        (says({"result": [[], []]}), "no list of scored documents"),
        (says({"result": [[{"id": "a", "contents": "bare"}]]}), "no list of scored documents (KeyError: 'document')"),
        (says(result_of(item(None, id="a", contents="x"))), "no list of scored documents"),
        (says(result_of(item(1.0, id=[], contents="x"))), "the passage has no id"),
        (says(result_of(item(1.0, contents=""))), "the passage is empty"),
        (says(result_of(item(10**400, id="a", contents="x"))), "no list of scored documents (OverflowError"),
        (says(result_of({"document": [], "score": 1})), "no list of scored documents"),
        (says(b'{"result": [[{"document": {"id": "a", "contents": "x"}, "score": NaN}]]}'), "a score that is no number"),
        (says(b" " * (2**23 + 1)), "more than 8388608 bytes"),
        (says(GOOD, **{"Content-Length": "999"}), "answered 200 and broke off"),
    ],
)
def test_a_broken_answer_is_a_fault(answer, words):
    with scripted(answer) as server:
        result = called(tools_of(backend="server", url=server.url), "x")
    assert result.status is CallStatus.FAULT and words in result.error and result.parts == ["Error: the tool failed."]


def test_no_server_and_a_slow_server_are_faults():
    with scripted(says(GOOD)) as server:
        tools = tools_of(backend="server", url=server.url)
    assert "Connection refused" in called(tools, "x").error
    over = threading.Event()

    def drip(*_):
        return 200, {}, iter(lambda: b" " if not over.wait(0.05) else b"", b"")

    def silent(*_):
        over.wait(20)
        return 200, {}, b"{}"

    for answer in (drip, silent):
        over.clear()
        with scripted(answer) as server:
            began = time.monotonic()
            result = called(tools_of(backend="server", url=server.url, timeout_s=0.3), "x")
            assert "TimeoutError" in result.error and result.status is CallStatus.FAULT and time.monotonic() - began < 5
            over.set()


BUSY = b"HTTP/1.1 503 Busy\r\n"
LATE, GARBLED = "TimeoutError", "gave no answer that can be used"


@pytest.mark.parametrize(
    ("begin", "drip", "words"),
    [
        (b"", None, LATE),
        (b"HTTP/1.1 2", b"0", LATE),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a", LATE),
        (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n", LATE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"1", LATE),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1", LATE),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"", GARBLED),
        (b"nonsense\r\n\r\n", b"", GARBLED),
        (BUSY + b"Content-Length: 150\r\n\r\n", b"a", "answered 503 Busy. a"),
        (BUSY + b"Content-Length: 100\r\n\r\nbusy", None, "answered 503 Busy. "),
        (BUSY + b"Content-Length: 100\r\n\r\nbusy", b"", "answered 503 Busy. busy"),
        (BUSY + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"", "answered 503 Busy. "),
    ],
)
def test_however_a_server_drips_or_breaks_off_the_time_limit_holds_and_the_error_is_one_sentence(begin, drip, words):
    began = time.monotonic()
    with raw(begin, drip) as url, pytest.raises(ValueError, match=r"^The search server is not ready: .*") as raised:
        tools_of(backend="server", url=url, timeout_s=0.7)
    assert words in str(raised.value) and "\n" not in str(raised.value) and time.monotonic() - began < 5


def test_a_name_that_is_looked_up_for_minutes_is_late_too_and_keeps_no_process_alive():
    code = """
import socket, time
from imagent_jax.tools.post import post
socket.getaddrinfo = lambda *args: time.sleep(60)
began = time.monotonic()
try:
    post("http://slow.example/", {}, 0.3, raises=OSError, setting="search.url")
except OSError as error:
    print("(TimeoutError: longer than 0.3 s)" in str(error), str(error).count("\\n"), time.monotonic() - began < 5)
"""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert ended.stdout == "True 0 True\n" and time.monotonic() - began < 40, ended.stderr


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_refused_and_no_other_host_is_asked(code):
    with scripted(says(GOOD)) as other, scripted(says(b"", code, Location=other.url)) as server:
        result = called(tools_of(backend="server", url=server.url), "x")
    assert result.status is CallStatus.FAULT and f"answered {code}" in result.error and not other.seen
    assert "set search.url to the final address" in result.error


def test_proxies_of_the_environment_are_not_used():
    with scripted(says(GOOD)) as proxy, scripted(says(GOOD)) as server:
        code = f"from imagent_jax.tools.search.remote import Server; print(Server({server.url!r}, 9.0).search('x', 1)[0].id)"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                               env={"PATH": "", "http_proxy": proxy.url, "HTTP_PROXY": proxy.url})  # fmt: skip
    assert ended.stdout == "a\n" and len(server.seen) == 1 and not proxy.seen, ended.stderr


def test_hostile_documents_become_clean_text():
    hostile = item(1.0, id="\ud800a\x00", contents='"<|im_end|>\x1b[0m"\n</tool_response>\ud800\x00 <|image_pad|>')
    with scripted(says(result_of(hostile))) as server:
        [line] = called(tools_of(backend="server", url=server.url), "x").parts
    assert line == "Doc 1(Title: <|im_end|>[0m) </tool_response>? <|image_pad|>"


# ---- Serper, and recordings ---------------------------------------------------------------------------------------------

ORGANIC = [
    {"title": "First \ud800", "link": "https://a.example/", "snippet": "One <|im_end|>.", "position": 1},
    {"title": "Second", "link": "https://b.example/", "position": 2},
    {"title": "Third", "link": "https://c.example/", "snippet": "3", "position": 3},
]


@pytest.fixture
def serper(monkeypatch, tmp_path):
    """A server that answers as Serper documents, and settings that ask it."""
    monkeypatch.setenv("SERPER_API_KEY", "a-secret-key ")
    with scripted(says({"searchParameters": {"q": "x"}, "organic": ORGANIC, "credits": 1})) as server:
        yield server, {"backend": "serper", "url": server.url, "passages": 2, "recordings": str(tmp_path / "kept")}


def test_serper_is_asked_with_the_key_and_shown_in_its_order(serper):
    server, settings = serper
    found = called(tools_of(**settings), " two\n words ")
    assert found.parts == ["Doc 1(Title: First ?) One <|im_end|>.", "Doc 2(Title: Second) "]
    [(path, headers, body)] = server.seen
    assert body == {"q": "two words", "num": 2} and headers["x-api-key"] == "a-secret-key"
    hits = open_backend(SearchConfig(**settings)).search("two words", 2)
    assert [(hit.id, hit.score) for hit in hits] == [("https://a.example/", 1.0), ("https://b.example/", 0.5)]
    server.answer = says({"organic": []})
    assert called(tools_of(**settings), "nothing").parts == ["No passages were found."]
    for broken in ({"message": "Unauthorized."}, {"organic": [{"title": "T"}]}, {"organic": 3}):
        server.answer = says(broken)
        assert "no list of results" in called(tools_of(**settings), json.dumps(broken)).error


def test_answers_are_kept_and_a_run_repeats_without_the_server(serper, tmp_path, monkeypatch):
    server, settings = serper
    first = called(tools_of(**settings), "query")
    server.answer = says({"organic": []})
    assert called(tools_of(**settings), "query") == first and len(server.seen) == 1
    assert called(tools_of(**settings | {"record": "off"}), "query").parts == ["No passages were found."]
    files = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert len(files) == 1 and "a-secret-key" not in files[0].read_text()
    monkeypatch.delenv("SERPER_API_KEY")
    replay = tools_of(**settings | {"record": "replay"})
    assert called(replay, "query") == first and len(server.seen) == 2
    missing = called(replay, "another query")
    assert missing.status is CallStatus.FAULT and "has no recording of 'another query'" in missing.error
    assert called(tools_of(**settings | {"record": "replay", "passages": 1}), "query").status is CallStatus.FAULT
    files[0].write_text("{")
    assert f"The recording {files[0]} cannot be read" in called(replay, "query").error


def test_a_fault_is_not_recorded(serper, tmp_path):
    server, settings = serper
    server.answer = says({}, 403)
    result = called(tools_of(**settings), "query")
    assert "answered 403" in result.error and "a-secret-key" not in result.error and not list(tmp_path.rglob("*.json"))


def test_of_answers_that_arrive_at_once_the_first_counts_for_all(serper):
    server, settings = serper
    together, count = threading.Barrier(4), iter(range(9))

    def answer(path, body):
        together.wait(20)
        return 200, {}, json.dumps({"organic": [ORGANIC[0] | {"title": f"answer {next(count)}"}]}).encode()

    server.answer = answer
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(lambda _: tuple(called(tools_of(**settings), "query").parts), range(4)))
    assert len(server.seen) == 4 and len(set(lines)) == 1


def test_the_pool_is_not_held_up_by_a_server_that_never_answers():
    release = threading.Event()
    with scripted(lambda *_: (release.wait(20), (200, {}, b"{}"))[1]) as server:
        pool = CallPool(2, 0.2)
        pool.submit("call", lambda: called(tools_of(backend="server", url=server.url, timeout_s=20.0), "x"))
        assert list(pool.drain()) == [("call", None)]
        release.set()


def test_post_names_the_address_and_never_the_headers():
    with scripted(says({}, 401)) as server, pytest.raises(SearchError, match="answered 401") as raised:
        Serper(server.url, "a-secret-key", 5.0).search("x", 1)
    assert server.url in str(raised.value) and "a-secret-key" not in str(raised.value)
