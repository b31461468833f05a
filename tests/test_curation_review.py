"""The review page in a real browser by keyboard alone, and who may visit its server."""

import http.client
import io
import json
import shutil
import signal
from contextlib import contextmanager
from threading import Thread

import pytest
from PIL import Image
from review_folder import Keyboard, Served, make_folder
from sklearn.metrics import cohen_kappa_score

from imagent_jax.curation import review_server
from imagent_jax.curation.decisions import Decisions, reviewed
from imagent_jax.curation.review import main, open_review, summary, token_of
from imagent_jax.curation.review_server import Server, visitor_host


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "made", 6)
    return tmp_path / "made"


@pytest.fixture
def serve():
    """Starts servers that end with the test."""
    started = []

    def start(*arguments, **more):
        started.append(Served(*arguments, **more))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def verdicts(folder, name):
    decisions = Decisions(folder)
    return [d.verdict for uid in decisions.questions for d in decisions.of(uid) if d.reviewer == name]


# ---- the page -------------------------------------------------------------------------------------------------------

KEYS = {"accept": "a", "reject": "r2", "unsure": "u"}


@pytest.mark.slow(9)
def test_two_reviewers_at_once_lose_nothing_when_the_server_is_killed_and_an_adjudicator_settles(folder, browser, serve):
    server = serve(folder, "anna", "ben")
    assert server.head.startswith(f"Showing 6 questions of {folder}. Decisions go to {folder / 'review.sqlite'}. Ctrl-C ends")
    anna, ben = (Keyboard(browser, server.urls[name]) for name in ("anna", "ben"))
    plan = [
        ("accept", "accept"),
        ("reject", "reject"),
        ("accept", "reject"),
        ("unsure", "accept"),
        ("accept", "accept"),
        ("reject", "reject"),
    ]
    for n, choices in enumerate(plan):
        assert anna.ready(f"q/{n}") == ben.ready(f"q/{n}") == f"q/{n}"
        if n == 3:
            server.kill()
        for reader, verdict in zip((anna, ben), choices, strict=True):
            reader.press(*KEYS[verdict])
        if n == 3:
            for reader in (anna, ben):
                reader.page.wait_for_selector("#away", state="visible")
                assert reader.page.get_attribute("#page", "data-ready") == "q/3"
            server = serve(folder, "anna", "ben", port=server.port)
    assert anna.ready("done") == ben.ready("done") == "done" and not anna.away()
    assert [verdicts(folder, name) for name in ("anna", "ben")] == [list(each) for each in zip(*plan, strict=True)]
    wanted = cohen_kappa_score(*zip(*plan, strict=True))
    ben.page.wait_for_selector(f'#agreement b:text-is("{wanted:.2f}")')
    assert "anna – ben" in ben.page.inner_text("#agreement") and "of 6" in ben.page.inner_text("#agreement")
    anna.page.wait_for_selector('#others:text-is("ben 6")')
    assert anna.page.inner_text("#count") == "6 of 6 decided"
    server.kill()
    server = serve(folder, "cleo", options=("--adjudicator",))
    assert server.head.startswith("Showing what reviewers disagree on")
    cleo = Keyboard(browser, server.urls["cleo"])
    voices = {"anna accept", "ben reject: another answer is right too"}  # in the order in which they arrived
    assert cleo.ready("q/2") and voices <= set(cleo.page.inner_text("#voices").split("\n"))
    cleo.press("a")
    assert cleo.ready("q/3")
    cleo.press("r", *"too dark", "Enter")
    assert cleo.ready("done")
    server.kill()
    assert [q.uid for q in reviewed(folder)] == ["q/0", "q/2", "q/4"] and verdicts(folder, "cleo") == ["accept", "reject"]
    assert [reader.errors for reader in (anna, ben, cleo)] == [[], [], []]
    for reader in (anna, ben, cleo):
        reader.page.close()


@contextmanager
def serving(folder, *names, **options):
    """The server in a thread."""
    server = Server(open_review(folder, names, **options), 0)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.review.decisions.close()


@contextmanager
def reading(browser, server, name="anna", place=""):
    reader = Keyboard(browser, f"http://127.0.0.1:{server.server_port}/?reviewer={name}{place}")
    yield reader
    reader.page.close()
    assert reader.errors == []


@pytest.mark.slow(2)
def test_a_question_is_mended_by_keyboard_alone(folder, browser):
    with serving(folder, "anna") as server, reading(browser, server) as anna:
        anna.press("m", "Control+a", *"Which?", "Tab", *"one", "Enter", *"two", "Tab", "Control+a", *"B", "Tab")
        anna.press("Control+End", "Enter", *"2 0 0 100 x", "Control+Enter")
        anna.page.wait_for_selector("#error", state="visible")
        assert "five whole numbers" in anna.page.inner_text("#error")
        anna.press("Backspace", *"200")
        assert anna.page.locator('[data-image="2"] .box').count() == 2  # drawn while it is typed
        anna.press("Control+Enter")
        anna.ready("q/1")
        anna.press("m", "Tab", "Tab", "Control+a", "Delete", "Control+Enter")  # no answer
        anna.page.wait_for_selector("#error", state="visible")
        assert anna.page.inner_text("#error") == "The answer is empty."
        anna.press("Escape", "k")
        anna.ready("q/0")
        assert anna.page.inner_text("#voices").startswith("You mend text: Which?")
        [decision] = server.review.decisions.of("q/0")
        assert decision.facts["changes"] == {
            "text": "Which?", "options": ["one", "two"], "answer": "B",
            "evidence": [{"image": n, "box": [500, 250, 750, 500]} for n in (1, 2)] + [{"image": 2, "box": [0, 0, 100, 200]}],
        }  # fmt: skip


@pytest.mark.slow(1)
def test_boxes_lie_on_what_they_claim_pictures_are_the_pools_and_text_is_text(folder, browser):
    with serving(folder, "anna") as server, reading(browser, server) as anna:
        assert anna.page.inner_text("#text").endswith("<b>0</b>")
        for n in (1, 2):
            frame = anna.page.locator(f'#images [data-image="{n}"]')
            whole, box = frame.bounding_box(), frame.locator(".box").bounding_box()
            wanted = [whole["x"] + whole["width"] / 2, whole["y"] + whole["height"] / 4, whole["width"] / 4, whole["height"] / 4]
            assert [box[name] for name in ("x", "y", "width", "height")] == pytest.approx(wanted, abs=0.6)
            assert whole["width"] / whole["height"] == pytest.approx(320 / 240, abs=0.01) and whole["width"] > 400
        anna.press("b")
        for n in (1, 2):  # the second is a TIFF, which no browser shows
            shot = anna.page.locator(f'#images [data-image="{n}"]').screenshot()
            seen = Image.open(io.BytesIO(shot)).convert("RGB").resize((40, 30), Image.Resampling.BOX)
            held = Image.open(next((folder / "pool").glob(f"p{n - 1}.*"))).convert("RGB").resize((40, 30), Image.Resampling.BOX)
            differences = [abs(a - b) for a, b in zip(seen.tobytes(), held.tobytes(), strict=True)]
            assert sum(differences) / len(differences) < 4


@pytest.mark.slow(1)
def test_a_box_is_drawn_with_the_mouse_while_a_question_is_mended(folder, browser):
    with serving(folder, "anna") as server, reading(browser, server) as anna:
        anna.press("m")
        frame = anna.page.locator('#images [data-image="2"]').bounding_box()
        for move, part in ((anna.page.mouse.down, 0.75), (anna.page.mouse.up, 0.5)):  # from the lower right
            anna.page.mouse.move(frame["x"] + part * frame["width"], frame["y"] + part * frame["height"])
            move()
        anna.press("Control+Enter")
        anna.ready("q/1")
        [decision] = server.review.decisions.of("q/0")
        image, *box = [decision.facts["changes"]["evidence"][-1][name] for name in ("image", "box")]
        assert image == 2 and box[0] == pytest.approx([500, 500, 750, 750], abs=2)


@pytest.mark.slow(1)
def test_zoom_shows_the_claimed_place_and_moves(folder, browser):
    with serving(folder, "anna") as server, reading(browser, server) as anna:
        anna.press("2", *"+++")
        box = anna.page.locator("#zoom .box").bounding_box()
        assert box["x"] + box["width"] / 2 == pytest.approx(700, abs=1) and box["y"] + box["height"] / 2 == pytest.approx(
            450, abs=1
        )
        wide = box["width"]
        anna.press("ArrowRight", "ArrowDown")
        moved = anna.page.locator("#zoom .box").bounding_box()
        assert moved["x"] < box["x"] - 100 and moved["y"] < box["y"] - 100 and moved["width"] == pytest.approx(wide)
        anna.press("0")
        whole = anna.page.locator("#zoom .picture").bounding_box()
        assert [whole[name] for name in ("x", "y", "width", "height")] == pytest.approx([100, 0, 1200, 900], abs=1)
        anna.press("Escape", "a")
        assert anna.ready("q/1") and verdicts(folder, "anna") == ["accept"]


@pytest.mark.slow(2)
def test_a_blind_reviewer_answers_before_the_claim_is_known_to_the_page(folder, browser):
    with serving(folder, "anna", blind=True) as server, reading(browser, server) as anna:
        assert (
            anna.ready() == "q/0?" and "claimed" not in anna.page.inner_text("aside") and anna.page.locator(".box").count() == 0
        )
        sent = ask(server, "/api/question?reviewer=anna&uid=q/0")[1]
        assert not {"answer", "evidence", "history", "mine", "others"} & sent.keys()
        assert ask(server, "/api/decide?reviewer=anna", body={"id": "x" * 8, "uid": "q/0", "verdict": "accept"})[0] == 400
        anna.press("Escape", "a", "u", "r", "m")  # nothing can be decided yet
        assert anna.ready() == "q/0?"
        anna.press("Enter", *"7", "Enter")
        assert anna.ready("q/0") and anna.page.locator(".box").count() == 2
        assert anna.page.inner_text("#claim").split("\n")[:4] == ["claimed answer", "1", "your answer", "7"]
        assert anna.page.locator("#claim .other").count() == 1
        anna.press("a")
        assert anna.ready("q/1?")
        anna.press(*"2", "Enter")
        assert anna.ready("q/1") and anna.page.locator("#claim .same").count() == 1
        assert server.review.decisions.blind == {"q/0": {"anna": "7"}, "q/1": {"anna": "2"}}


@pytest.mark.slow(1)
def test_a_decision_that_was_not_confirmed_is_sent_when_the_page_is_opened_again(folder, browser, monkeypatch):
    answer, lost = review_server.Handler._json, []

    def break_off(handler, values, status=200):
        """A decision arrives, and the connection breaks before its answer."""
        if handler.path.startswith("/api/decide"):
            lost.append(status)
            raise ConnectionResetError
        answer(handler, values, status)

    with serving(folder, "anna", "ben") as server, reading(browser, server) as anna:
        monkeypatch.setattr(review_server.Handler, "_json", break_off)
        anna.press("a")
        anna.page.wait_for_selector("#away", state="visible")
        anna.page.reload()
        anna.page.wait_for_selector("#away", state="visible")
        monkeypatch.undo()
        assert anna.ready("q/1") and len(lost) >= 2
        assert verdicts(folder, "anna") == ["accept"]
        assert server.review.decisions._base.execute("SELECT count(*) FROM log").fetchone() == (1,)


# ---- who may visit --------------------------------------------------------------------------------------------------


def ask(server, path, body=None, **headers):
    """Status, JSON and headers of an answer. A decision is on the question as it stands, unless it says otherwise."""
    if isinstance(body, dict):
        body = {"content": server.review.decisions.contents.get(body["uid"])} | body
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    data = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, {name.replace("_", "-"): v for name, v in headers.items()})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text) if reply.getheader("Content-Type") == "application/json" else text, reply.headers


@pytest.mark.parametrize(("header", "ours"), [
    ("127.0.0.1:80", True), ("localhost", True), ("[::1]:80", True), ("192.168.7.7:80", True), ("me.example:80", True),
    ("evil.example", False), ("evil.example:80", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False),
    ("", False), ("[", False), ("user@evil.example", False),
])  # fmt: skip
def test_a_host_header_names_this_machine(header, ours):
    assert visitor_host(header, "me.example") == ours


def test_a_name_that_leads_here_from_elsewhere_reads_and_decides_nothing(folder):
    with serving(folder, "anna") as server:
        decision = {"id": "x" * 8, "uid": "q/0", "verdict": "accept"}
        for path in ("/", "/api/start", "/image/p0"):
            assert ask(server, path, Host="evil.example")[0] == 403 and ask(server, path)[0] == 200
        assert ask(server, "/api/decide", decision, Host="evil.example")[0] == 403
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.server_port + 1}"):
            assert ask(server, "/api/decide", decision, Origin=origin)[0] == 403
        assert verdicts(folder, "anna") == []
        assert ask(server, "/api/decide", decision, Origin=f"http://127.0.0.1:{server.server_port}")[0] == 200
        assert verdicts(folder, "anna") == ["accept"]


def test_another_address_needs_the_token_once_and_then_its_cookie(folder, monkeypatch):
    asked, compare = [], review_server.hmac.compare_digest
    monkeypatch.setattr(review_server.hmac, "compare_digest", lambda a, b: asked.append((a, b)) or compare(a, b))
    with serving(folder, "anna", host="0.0.0.0") as server:
        token = server.review.token
        assert token == token_of(folder) and len(token) > 30 and (folder / "review.token").stat().st_mode & 0o77 == 0
        for path in ("/", "/review.js", "/api/start", "/image/p0", "/?token=", "/?token=wrong", "/?token=%C3%A9"):
            status, said, _ = ask(server, path)
            assert status == 403 and "the address with its token" in said["error"]
        status, _, headers = ask(server, f"/?reviewer=anna&token={token}")
        assert status == 303 and headers["Location"] == "/?reviewer=anna" and "HttpOnly" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].split(";")[0]
        assert ask(server, "/api/start", Cookie=cookie)[0] == 200
        for wrong in (cookie + "x", cookie.split("=")[0] + "=", "a=b", "=;;", cookie.replace("review_", "review_1")):
            assert ask(server, "/api/start", Cookie=wrong)[0] == 403
        assert (b"wrong", token.encode()) in asked
        assert ask(server, "/api/decide", {"id": "x" * 8, "uid": "q/0", "verdict": "accept"})[0] == 403
    with serving(folder, "anna", host="0.0.0.0") as server:
        assert server.review.token == token  # pages that are open go on after a restart


@pytest.mark.slow(2)
def test_the_address_with_the_token_opens_the_page_and_ctrl_c_says_where_the_review_stands(folder, browser, serve):
    server = serve(folder, "anna", options=("--host", "0.0.0.0"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/?{server.urls['anna'].partition('?')[2]}")
    page.wait_for_selector('#page[data-ready="q/0"]')
    assert "token" not in page.url and page.inner_text("#who") == "anna"
    page.keyboard.press("a")
    page.wait_for_selector('#page[data-ready="q/1"]')
    context.close()
    server.process.send_signal(signal.SIGINT)
    told = server.process.stdout.read()
    assert server.process.wait() == 0 and verdicts(folder, "anna") == ["accept"]
    assert told == (
        "\nanna: 1 of 6 questions\nWith two reviewers: 0 kept, 0 rejected, 0 disagreed, 6 open.\n"
        f"`--export` writes the decisions to {folder / 'decisions.jsonl'}.\n"
    )


def test_what_is_no_request_of_the_page_is_refused(folder):
    good = {"id": "x" * 8, "uid": "q/0", "verdict": "accept"}
    with serving(folder, "anna", "ben") as server:
        for path, status in [
            ("/image/../questions.jsonl", 404), ("/image/%2e%2e%2fquestions.jsonl", 404), ("/image/p99", 404), ("/other", 403),
            ("/api/other?reviewer=anna", 404), ("/api/start", 403), ("/api/start?reviewer=eve", 403),
            ("/api/question?reviewer=anna&uid=q/9", 404),
        ]:  # fmt: skip
            assert ask(server, path)[0] == status, path
        for body, words in [
            ([], "JSON object"), ({**good, "id": "short"}, "8 to 80"), ({**good, "verdict": "yes"}, "one of accept"),
            ({**good, "uid": "q/9"}, "There is no question 'q/9'."), ({**good, "verdict": "reject"}, "A rejection has a reason"),
            ({**good, "verdict": "mend", "changes": 5}, "."), ({**good, "verdict": "answer"}, "The answer is empty"),
        ]:  # fmt: skip
            status, said, _ = ask(server, "/api/decide?reviewer=anna", body)
            assert status == 400 and words in said["error"]
        for length in ("1048577", "", "-1", "x"):
            status, said, _ = ask(server, "/api/decide?reviewer=anna", good, Content_Length=length)
            assert status == 413 and "at most 1 MB" in said["error"]
        assert server.review.status()["progress"] == {}
        headers = ask(server, "/")[2]
        assert (
            headers["Content-Security-Policy"].startswith("default-src 'self'") and headers["X-Content-Type-Options"] == "nosniff"
        )


def test_a_page_that_shows_another_question_under_the_same_uid_decides_nothing(folder):
    with serving(folder, "anna") as server:
        shown = ask(server, "/api/question?uid=q/0")[1]
    lines = (folder / "questions.jsonl").read_text()
    (folder / "questions.jsonl").write_text(lines.replace("<b>0</b>", "<b>zero</b>"))  # a new run, or another folder's
    decision = {"id": "x" * 8, "uid": "q/0", "verdict": "accept", "content": shown["content"]}
    with serving(folder, "anna") as server:
        for sent in (decision, decision | {"verdict": "answer", "answer": "1"}, decision | {"content": None}):
            status, said, _ = ask(server, "/api/decide", sent)
            assert (status, said["error"]) == (400, "The question 'q/0' is not the one that the page shows; load the page again.")
        assert verdicts(folder, "anna") == [] and server.review.decisions.blind == {}
        now = ask(server, "/api/question?uid=q/0")[1]["content"]
        assert now != shown["content"] and ask(server, "/api/decide", decision | {"content": now})[0] == 200


def test_an_adjudicator_settles_disagreements_only(folder):
    with serving(folder, "anna", "ben") as server:
        for name, verdict in (("anna", "accept"), ("ben", "unsure")):
            ask(server, f"/api/decide?reviewer={name}", {"id": f"{name} {verdict}", "uid": "q/4", "verdict": verdict})
    with serving(folder, "cleo", adjudicator=True) as server:
        assert ask(server, "/api/start?reviewer=cleo")[1]["order"] == ["q/4"]
        assert ask(server, "/api/decide", {"id": "x" * 8, "uid": "q/0", "verdict": "accept"})[0] == 400
        assert ask(server, "/api/decide", {"id": "x" * 8, "uid": "q/4", "verdict": "accept"})[0] == 200
        told = summary(server.review.decisions)
        assert "anna and ben: alike on 0 of 1, kappa 0.00\nWith two reviewers: 1 kept, 0 rejected, 0 disagreed, 5 open." in told
    with pytest.raises(ValueError, match="anna has reviewed in this folder; an adjudicator is somebody else"):
        open_review(folder, ["anna"], adjudicator=True)
    with pytest.raises(ValueError, match="cleo has settled disagreements"):
        open_review(folder, ["cleo"])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(folder, capsys):
    with serving(folder, "anna") as server:
        for arguments, words in [
            (["nowhere", "--reviewer", "anna"], "There is no nowhere/questions.jsonl"),
            ([str(folder)], "say who reviews: --reviewer NAME"),
            ([str(folder), "--reviewer", "<b>"], "The name '<b>' cannot be used"),
            ([str(folder), "--reviewer", "anna", "--port", str(server.server_port)], "give another --port"),
            ([str(folder), "--reviewer", "anna", "--port", "99999"], "give another --port"),
            ([str(folder), "--reviewer", "anna", "--host", "no.such.host.invalid"], "give another --port or --host"),
            (["nowhere", "--export"], "nobody has reviewed it yet"),
        ]:  # fmt: skip
            assert main([*arguments, "--no-open"]) == 2
            said = capsys.readouterr()
            assert said.err.startswith("error: ") and words in said.err and said.err.count("\n") == 1 and not said.out
    (folder / "decisions.jsonl").mkdir()
    assert main([str(folder), "--export"]) == 2
    said = capsys.readouterr().err
    assert "decisions.jsonl" in said and "--port" not in said and said.count("\n") == 1
    (folder / "pool" / "p3.png").unlink()
    assert main([str(folder), "--reviewer", "anna"]) == 2
    assert "has no picture 'p3', which question 'q/2' shows" in capsys.readouterr().err


def test_decisions_are_exported(folder, capsys):
    with serving(folder, "anna") as server:
        ask(server, "/api/decide", {"id": "x" * 8, "uid": "q/0", "verdict": "reject", "reason": "dark"})
    assert main([str(folder), "--export"]) == 0 and str(folder / "decisions.jsonl") in capsys.readouterr().out
    [line] = map(json.loads, (folder / "decisions.jsonl").read_text().splitlines())
    assert (line["question"], line["reviewer"], line["verdict"], line["facts"]) == ("q/0", "anna", "reject", {"reason": "dark"})
    shutil.rmtree(folder / "pool")  # pictures are not needed
    assert main([str(folder), "--export"]) == 0
