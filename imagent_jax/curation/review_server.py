"""The server of a review: its pages, their data, and who may visit them. Standard library only; one thread a connection."""

import contextlib
import hmac
import ipaddress
import json
import socket
import sqlite3
import urllib.parse
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from imagent_jax.curation.decisions import BLIND, VERDICTS, Decision, Decisions
from imagent_jax.curation.pool import showable

ASSETS = Path(__file__).parent / "assets"
PAGES = {
    "/": (ASSETS / "review.html", "text/html; charset=utf-8"),
    "/review.css": (ASSETS / "review.css", "text/css; charset=utf-8"),
    "/review.js": (ASSETS / "review.js", "text/javascript; charset=utf-8"),
    "/theme.css": (ASSETS.parent.parent / "runs" / "assets" / "theme.css", "text/css; charset=utf-8"),
}
MOST_BYTES = 1 << 20


class Refused(Exception):
    """A request that is not served. Attributes: `status`, of HTTP."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Review:
    """What the server shows, and to whom.

    Attributes:
        decisions: questions and what was decided.
        pool: file of each picture, by id.
        reviewers: names that may decide here.
        blind: the claim is shown after the reviewer's own answer only.
        adjudicator: they settle what others disagree on, and see nothing else.
        host: address that the server listens on.
        token: what a visitor has to show; "": nothing, on the machine's own address.
    """

    decisions: Decisions
    pool: dict[str, Path]
    reviewers: tuple[str, ...]
    blind: bool = False
    adjudicator: bool = False
    host: str = "127.0.0.1"
    token: str = ""

    def start(self, reviewer: str) -> dict[str, Any]:
        """Return the order of the questions and where the reviewer stands."""
        decisions = self.decisions
        order = decisions.disputed() if self.adjudicator else list(decisions.questions)
        mine = {uid: d.verdict for uid in order for d in decisions.of(uid) if d.reviewer == reviewer}
        return {"order": order, "mine": mine, "blind": self.blind, "adjudicator": self.adjudicator} | self.status()

    def status(self) -> dict[str, Any]:
        """Return what changes while people review: progress and agreement."""
        self.decisions.refresh()
        return {
            "total": len(self.decisions.questions),
            "progress": self.decisions.progress(),
            "agreement": self.decisions.agreement(),
            "disputed": len(self.decisions.disputed()) if self.adjudicator else 0,
        }

    def question(self, reviewer: str, uid: str) -> dict[str, Any]:
        """Return a question as the reviewer may see it now.

        Raises:
            Refused: there is no such question.
        """
        question = self.decisions.questions.get(uid)
        if question is None:
            raise Refused(404, f"There is no question {uid!r}.")
        own = self.decisions.blind.get(uid, {}).get(reviewer)
        shown = {
            "uid": uid,
            "content": self.decisions.contents[uid],
            "text": question.text,
            "images": question.images,
            "options": question.options,
            "kind": question.kind,
            "several": question.several,
            "own": own,
            "hidden": self.blind and own is None,
        }
        if shown["hidden"]:
            return shown
        decided = self.decisions.of(uid)
        mine = next(({"verdict": d.verdict, **d.facts} for d in decided if d.reviewer == reviewer), None)
        others = [
            {"reviewer": d.reviewer, "verdict": d.verdict, **d.facts, "own": self.decisions.blind.get(uid, {}).get(d.reviewer)}
            for d in decided
            if self.adjudicator and not d.adjudicator
        ]
        return shown | {
            "answer": question.answer,
            "evidence": [{"image": e.image, "box": e.box} for e in question.evidence],
            "history": [{"by": e.by, "what": e.what, "facts": dict(e.facts)} for e in question.history],
            "mine": mine,
            "others": others,
        }

    def decide(self, reviewer: str, sent: dict[str, Any]) -> dict[str, Any]:
        """Keep a decision that the page sent; return the status, and the claim after a blind answer.

        Raises:
            Refused: it is none.
        """
        id, uid, verdict = (str(sent.get(name, "")) for name in ("id", "uid", "verdict"))
        if not 8 <= len(id) <= 80 or verdict not in (*VERDICTS, BLIND):
            raise Refused(400, f"A decision has an id of 8 to 80 characters and a verdict, one of {', '.join(VERDICTS)}.")
        if sent.get("content") != self.decisions.contents.get(uid, sent.get("content")):  # a page of before, or of another folder
            raise Refused(400, f"The question {uid!r} is not the one that the page shows; load the page again.")
        if self.adjudicator and uid not in self.decisions.disputed():
            raise Refused(400, f"Nobody disagrees on {uid!r}; an adjudicator decides disagreements only.")
        if self.blind and verdict != BLIND and self.question(reviewer, uid)["hidden"]:
            raise Refused(400, "Answer first: this review is blind.")
        names = {"mend": ("changes",), "reject": ("reason",), BLIND: ("answer",)}.get(verdict, ())
        facts = {name: sent[name] if name == "changes" else str(sent[name]).strip() for name in names if name in sent}
        if verdict == BLIND and not facts.get("answer"):
            raise Refused(400, "The answer is empty; write one, or a question mark.")
        try:
            self.decisions.add(id, Decision(uid, reviewer, verdict, facts, self.adjudicator))
        except (ValueError, AttributeError) as error:
            raise Refused(400, f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
        return self.status() | ({"question": self.question(reviewer, uid)} if verdict == BLIND else {})


def visitor_host(header: str, own: str) -> bool:
    """Return whether a Host header names this machine: an address in digits, localhost, its name, or what `--host` says.

    A name of somebody else's that leads here (DNS rebinding) would let that site's page read ours.
    """
    host = ""
    with contextlib.suppress(ValueError):
        host = urllib.parse.urlsplit(f"//{header}").hostname or ""
        ipaddress.ip_address(host)
        return True
    return host in {"localhost", own.lower(), socket.gethostname().lower()}


class Handler(BaseHTTPRequestHandler):
    """One visitor's connection."""

    protocol_version, timeout = "HTTP/1.1", 60

    @property
    def review(self) -> Review:
        """What the server shows."""
        return cast(Server, self.server).review

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Serve the page, its data and its pictures."""
        self._serve(None)

    def do_POST(self) -> None:
        """Keep a decision."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True
            self._json({"error": "A decision is JSON of at most 1 MB."}, 413)
            return
        self._serve(self.rfile.read(int(length)))

    def _serve(self, body: bytes | None) -> None:
        try:
            self._route(body)
        except Refused as error:
            self._json({"error": str(error)}, error.status)
        except sqlite3.Error as error:  # the page tries again
            self._json({"error": f"The decision cannot be written ({error}); make room on the disk."}, 503)
        except OSError:  # a file or the visitor has gone
            self.close_connection = True
        except ValueError as error:
            self._json({"error": f"The picture cannot be shown: {error}."}, 404)

    def _route(self, body: bytes | None) -> None:
        review, url = self.review, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        host = self.headers.get("Host", "")
        if not visitor_host(host, review.host):
            raise Refused(403, f"This server is not {host!r}; open it by its address.")
        if review.token and self._admitted(query):
            return
        if body is not None:
            origin = self.headers.get("Origin", "")
            if origin and urllib.parse.urlsplit(origin).netloc != host:
                raise Refused(403, "Another site's page may not decide.")
        if url.path in PAGES and body is None:
            path, kind = PAGES[url.path]
            self._send(200, path.read_bytes(), kind)
        elif url.path.startswith("/image/") and body is None:
            self._image(urllib.parse.unquote(url.path.removeprefix("/image/")))
        else:
            self._json(self._answer(url.path, query, body))

    def _answer(self, path: str, query: dict[str, str], body: bytes | None) -> dict[str, Any]:
        review, reviewer = self.review, query.get("reviewer", "")
        if not reviewer and len(review.reviewers) == 1:
            reviewer = review.reviewers[0]
        if reviewer not in review.reviewers:
            raise Refused(403, f"Nobody is named {reviewer!r} here; open the page of one of {', '.join(review.reviewers)}.")
        if body is not None and path == "/api/decide":
            try:
                sent = json.loads(body)
            except (ValueError, RecursionError):
                sent = None
            if not isinstance(sent, dict):
                raise Refused(400, "A decision is a JSON object.")
            return review.decide(reviewer, sent)
        if body is None and path == "/api/start":
            return review.start(reviewer) | {"reviewer": reviewer}
        if body is None and path == "/api/status":
            return review.status()
        if body is None and path == "/api/question":
            return review.question(reviewer, query.get("uid", ""))
        raise Refused(404, "There is no such page.")

    def _admitted(self, query: dict[str, str]) -> bool:
        """Admit who shows the token: by cookie, or once in the address, which is answered with the cookie (True).

        Raises:
            Refused: the token is missing or wrong.
        """
        review, cookie = self.review, f"review_{cast(Server, self.server).server_port}"
        if "token" in query and _same(query["token"], review.token):
            rest = urllib.parse.urlencode({name: value for name, value in query.items() if name != "token"})
            self.send_response(303)
            self.send_header("Location", f"/?{rest}")
            self.send_header("Set-Cookie", f"{cookie}={review.token}; HttpOnly; SameSite=Lax; Path=/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True
        with contextlib.suppress(CookieError):
            shown = SimpleCookie(self.headers.get("Cookie", "")).get(cookie)
            if shown is not None and _same(shown.value, review.token):
                return False
        raise Refused(403, "This page needs the address with its token, which the server printed when it started.")

    def _image(self, name: str) -> None:
        path = self.review.pool.get(name)
        if path is None:
            raise Refused(404, f"There is no picture {name!r}.")
        self._send(200, *showable(path.read_bytes()), "private, max-age=3600")

    def _json(self, values: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"), "application/json")

    def _send(self, status: int, data: bytes, kind: str, cache: str = "no-store") -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Cache-Control": cache,
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
            "Referrer-Policy": "no-referrer",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """The server of a review."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, review: Review, port: int):
        if ":" in review.host:
            self.address_family = socket.AF_INET6
        self.review = review
        super().__init__((review.host, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a browser has gone."""


def _same(first: str, second: str) -> bool:
    return hmac.compare_digest(first.encode("utf-8", "replace"), second.encode())
