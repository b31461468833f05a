"""The endpoint against a real server in a process of its own, which speaks the protocol and fails in every way it can."""

import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from agent_server import QUICK, SCHEMA, SLOW, Remote
from curation_client import asked, config, killed_and_resumed

from imagent_jax.config import read_own
from imagent_jax.curation.agents import AgentError
from imagent_jax.curation.endpoint import Endpoint, EndpointConfig, Unusable, read_answer


@pytest.fixture(scope="module")
def remote():
    server = Remote()
    yield server
    server.stop()


@pytest.fixture
def server(remote):
    remote.tell(reset=True)
    return remote


@pytest.fixture
def endpoint(server, tmp_path):
    made = Endpoint(config(server.url, str(tmp_path)))
    yield made
    made.close()


def all_of(endpoint, items, threads=16):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda item: endpoint.complete(asked(item), SCHEMA), items))


# ---- what is asked, and what it gives -------------------------------------------------------------------------------


def test_the_answer_is_the_servers_and_the_request_is_the_protocols(server, endpoint):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "item 12"}, picture]}]
    assert endpoint.complete(messages, SCHEMA) == {"item": 12, "square": 144}
    stats = server.stats()
    assert stats["last"]["messages"] == messages and stats["last"]["model"] == "m" and stats["keys"] == ["Bearer none"]
    assert stats["last"]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert not {"temperature", "seed", "max_tokens", "stream"} & stats["last"].keys()
    assert endpoint.counts == {"items": 1, "kept": 0, "calls": 1, "retries": 0, "prompt_tokens": 10, "completion_tokens": 5}


def test_sampling_settings_and_the_key_are_sent(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    own = {"temperature": 0.5, "seed": 3, "max_tokens": 99}
    with_key = Endpoint(config(server.url, str(tmp_path), key_env="MY_KEY", **own))
    with_key.check()
    stats = server.stats()
    assert {name: stats["last"][name] for name in own} == own and stats["keys"] == ["Bearer secret"]


def test_an_answer_depends_on_all_that_is_asked_and_on_no_address(server, tmp_path):
    first = config(server.url, str(tmp_path))
    changes = [{}, {"model": "n"}, {"seed": 1}, {"temperature": 0.0}, {"max_tokens": 5}]
    keys = [Endpoint(config(server.url, str(tmp_path), **change)).path(asked(1), SCHEMA) for change in changes]
    keys += [Endpoint(first).path(asked(2), SCHEMA), Endpoint(first).path(asked(1), {"type": "object"})]
    assert len(set(keys)) == 7
    assert Endpoint(config("http://elsewhere/v1", str(tmp_path), parallel=3)).path(asked(1), SCHEMA) == keys[0]


@pytest.mark.parametrize("forms", [["json_object"], []])
def test_a_server_that_knows_no_schema_is_told_it_in_the_prompt(server, endpoint, forms):
    server.tell(forms=forms, queue=["fenced"])
    assert endpoint.complete(asked(3), SCHEMA) == {"item": 3, "square": 9}
    last = server.stats()["last"]
    assert last["messages"][0]["content"].endswith(json.dumps(SCHEMA)) and ("response_format" in last) == bool(forms)
    calls = endpoint.counts["calls"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "item 4"}]}]
    assert endpoint.complete(parts, SCHEMA)["square"] == 16
    assert endpoint.counts["calls"] == calls + 1 and endpoint.counts["retries"] == 0  # the form is remembered
    assert server.stats()["last"]["messages"][0]["content"][1]["text"].endswith(json.dumps(SCHEMA))


BOX = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}, "required": ["x"]}
NESTED = {"type": "object", "properties": {"boxes": {"type": "array", "items": BOX}}, "required": ["boxes"]}
REPLIES = [
    ('{"boxes": [{"x": 9}]}', True), ('Here:\n```json\n{"boxes": []}\n```', True), ('<think>{"a": 1}</think>{"boxes": []}', True),
    ('{"boxes": [{"x": 10}]}', False), ('{"boxes": [{}]}', False), ('{"boxes": [{"x": "1"}]}', False), ('{"boxes": [', False),
    ("[]", False), ("", False), ('{"boxes": [], "y": NaN}', False), ('{"boxes": [], "y": 1e999}', False), ("{" * 9000, False),
    (r'{"boxes": [], "y": "\ud83d\ude00"}', True), (r'{"boxes": [], "y": "\ud83d"}', False),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "good"), REPLIES)
def test_the_object_in_a_reply_matches_the_schema_or_is_none(reply, good):
    if good:
        assert "boxes" in read_answer(reply, NESTED)
    else:
        with pytest.raises(Unusable, match="it is no JSON object|the schema says otherwise"):
            read_answer(reply, NESTED)


# ---- what fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", QUICK)
def test_a_request_that_fails_is_made_again(server, endpoint, fault):
    server.tell(queue=[fault, fault])
    assert endpoint.complete(asked(5), SCHEMA) == {"item": 5, "square": 25}
    assert server.stats()["asked"] == {"5": 3} and endpoint.counts["calls"] == 3 and endpoint.counts["retries"] == 2


@pytest.mark.parametrize("fault", SLOW)
def test_a_request_that_takes_too_long_is_made_again(server, tmp_path, fault):
    hasty = Endpoint(config(server.url, str(tmp_path), timeout_s=1.0))
    server.tell(queue=[fault])
    assert hasty.complete(asked(5), SCHEMA) == {"item": 5, "square": 25} and hasty.counts["retries"] >= 1


def test_a_model_is_told_what_is_wrong_with_its_reply(server, endpoint):
    server.tell(queue=["wrong schema"])
    endpoint.complete(asked(5), SCHEMA)
    question, said, told = server.stats()["last"]["messages"]
    assert question == asked(5)[0] and said == {"role": "assistant", "content": '{"item": "5"}'}
    assert "'square' is a required property" in told["content"] or "'5' is not of type" in told["content"]


def test_all_requests_wait_as_long_as_the_server_says(server, endpoint):
    server.tell(queue=["429"], retry_after="1")
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(endpoint.complete, asked(5), SCHEMA)
        while endpoint._not_before == 0:
            time.sleep(0.01)
        endpoint.complete(asked(6), SCHEMA)
        assert time.monotonic() - began >= 1.0  # of the backoff alone: 0.02
        assert first.result()["square"] == 25 and endpoint.counts["calls"] == 3


def test_a_server_may_name_a_date_to_wait_for(server, endpoint):
    until = (datetime.now(UTC) + timedelta(seconds=2)).replace(microsecond=0)
    server.tell(queue=["429"], retry_after=format_datetime(until, usegmt=True))
    endpoint.complete(asked(5), SCHEMA)
    assert datetime.now(UTC) >= until


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "refuses the key .*; put a valid one"),
        ("403", "refuses the key"),
        ("404", "has no model 'm' .*; mend model or base_url"),
    ],
)
def test_what_another_request_cannot_mend_is_said_at_once_and_asked_once(server, endpoint, fault, words):
    server.tell(queue=[fault] * 9)
    for item in (1, 2):
        with pytest.raises(AgentError, match=words):
            endpoint.complete(asked(item), SCHEMA)
    assert server.stats()["asked"] == {"1": 1} and endpoint.counts["retries"] == 0


def test_a_refused_request_ends_that_item_alone(server, endpoint):
    server.tell(queue=["400", "422", "400"])
    with pytest.raises(AgentError, match="refuses the request .*; mend the prompt or the settings"):
        endpoint.complete(asked(1), SCHEMA)
    assert endpoint.complete(asked(2), SCHEMA)["square"] == 4 and "response_format" in server.stats()["last"]


def test_a_server_that_fails_to_the_end_is_an_error_and_nothing_is_kept(server, tmp_path):
    once = Endpoint(config(server.url, str(tmp_path), retries=1))
    server.tell(queue=["500"] * 2)
    with pytest.raises(AgentError, match=r"gave no answer that can be used in 2 requests \(InternalServerError: .*told to fail"):
        once.complete(asked(1), SCHEMA)
    assert once.complete(asked(1), SCHEMA)["square"] == 1 and server.stats()["asked"] == {"1": 3}


def test_a_server_that_is_not_there_is_a_sentence(tmp_path):
    gone = Remote()
    gone.stop()
    with pytest.raises(AgentError, match=rf"^There is no server at {gone.url} \(.*\); start it, or mend base_url\.$"):
        Endpoint(config(gone.url, str(tmp_path), retries=2)).check()


def test_settings_that_cannot_work_are_sentences(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    for changes, words in [
        ({"model": ""}, "is not named; set model"),
        ({"base_url": "localhost"}, "base_url is 'localhost'; give a full address"),
        ({"key_env": "MY_KEY"}, "MY_KEY, which key_env names, is not set; export"),
    ]:
        with pytest.raises(ValueError, match=words):
            Endpoint(config("http://x/v1", str(tmp_path), **changes))
    with pytest.raises(ValueError, match=r"no setting agents.a.modle"):
        read_own(Endpoint.Settings, {"modle": "m"}, "agents.a")
    with pytest.raises(ValueError, match=r"agents.a.parallel is 0; it must be at least 1"):
        read_own(EndpointConfig, {"parallel": 0}, "agents.a")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r'pip install "imagent-jax\[curation\]"'):
        Endpoint(config("http://x/v1", str(tmp_path)))


def test_the_page_lists_every_setting_with_its_default_and_its_help():
    page = (Path(__file__).parent.parent / "docs" / "review.md").read_text()
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in dataclasses.fields(EndpointConfig)]
    assert "\n".join(rows) in page


# ---- answers on disk ------------------------------------------------------------------------------------------------


def test_requests_run_at_once_up_to_a_bound(server, tmp_path):
    server.tell(pause=0.3)
    all_of(Endpoint(config(server.url, str(tmp_path), parallel=3)), range(9))
    assert server.stats()["most"] == 3


def test_every_item_is_done_once_whatever_fails(server, tmp_path):
    server.tell(every=2, pause=0.02)
    busy = Endpoint(config(server.url, str(tmp_path)))
    assert all_of(busy, range(60)) == [{"item": n, "square": n * n} for n in range(60)]
    stats = server.stats()
    assert stats["answered"] == {str(n): 1 for n in range(60)}
    assert busy.counts["retries"] == sum(stats["asked"].values()) - 60 > 30
    again = Endpoint(config(server.url, str(tmp_path)))
    assert all_of(again, range(60)) == [{"item": n, "square": n * n} for n in range(60)]
    assert again.counts == {"items": 60, "kept": 60, "calls": 0, "retries": 0, "prompt_tokens": 0, "completion_tokens": 0}
    assert not list(tmp_path.rglob("*.part"))


def test_equal_requests_at_once_are_one(server, endpoint):
    server.tell(pause=0.3)
    assert all_of(endpoint, [7] * 12, threads=12) == [{"item": 7, "square": 49}] * 12
    assert server.stats()["asked"] == {"7": 1}


def test_of_two_processes_the_first_answer_stays(server, tmp_path):
    mine, other = (Endpoint(config(server.url, str(tmp_path))) for _ in range(2))
    path = mine.path(asked(4), SCHEMA)
    server.tell(pause=2.0)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(mine.complete, asked(4), SCHEMA)
        while not server.stats()["asked"]:
            time.sleep(0.01)
        path.parent.mkdir(parents=True)
        path.write_text('{"answer": {"item": 4, "square": -1}}')
        assert late.result() == {"item": 4, "square": -1}
    assert other.complete(asked(4), SCHEMA) == {"item": 4, "square": -1} and server.stats()["asked"] == {"4": 1}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"answer": {"item": 4}}'])
def test_a_damaged_file_is_asked_for_again(server, endpoint, damage):
    endpoint.complete(asked(4), SCHEMA)
    path = endpoint.path(asked(4), SCHEMA)
    path.write_text(damage)
    assert endpoint.complete(asked(4), SCHEMA)["square"] == 16 and server.stats()["asked"] == {"4": 2}
    assert json.loads(path.read_text())["answer"]["square"] == 16


def test_an_answer_that_cannot_be_kept_is_a_sentence(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentError, match="cannot be kept in .*; make room, or set another cache_dir"):
        Endpoint(config(server.url, str(tmp_path / "file"))).complete(asked(1), SCHEMA)


def test_closing_ends_what_waits(server, endpoint):
    server.tell(queue=["429"], retry_after="60")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(endpoint.complete, asked(1), SCHEMA)
        while endpoint._not_before == 0:
            time.sleep(0.01)
        endpoint.close()
        with pytest.raises(AgentError, match="The run was stopped"):
            waiting.result()


@pytest.mark.slow(6)
def test_a_killed_process_resumes_to_the_byte_and_asks_for_nothing_that_was_kept(server, tmp_path):
    found = killed_and_resumed(server, tmp_path, items=40, kills=2)
    assert found["same"] and found["kept_and_asked_again"] == 0 and min(found["kept_at_kills"]) > 0
    assert found["last_process"]["kept"] >= found["kept_at_kills"][-1]
