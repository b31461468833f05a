"""People check the questions on a local page: `imagent curate --review FOLDER --reviewer NAME`.

The folder has `questions.jsonl` and the pictures `pool/<id>.*`. Every decision is on disk (`review.sqlite`) before the page goes
on. The page sends a decision, with an id of its own, until the server confirms it: a killed server loses nothing.
"""

import argparse
import contextlib
import ipaddress
import os
import re
import secrets
import socket
import sys
import urllib.parse
import webbrowser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from imagent_jax.curation.decisions import Decisions, export
from imagent_jax.curation.review_server import Review, Server

PORT = 8631
_NAME = re.compile(r"\w[\w .@-]{0,39}")


def token_of(folder: Path) -> str:
    """Return the token of a folder, made at the first call, so that pages that are open outlive a restart of the server."""
    path = folder / "review.token"
    with contextlib.suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(24))
    token = path.read_text().strip()
    if len(token) < 20:
        raise ValueError(f"{path} holds no token; delete it.")
    return token


def pool_of(folder: Path, decisions: Decisions) -> dict[str, Path]:
    """Return the file of each picture of a folder's pool, by id.

    Raises:
        ValueError: a question shows a picture that is not there.
    """
    pool = {path.stem: path for path in sorted((folder / "pool").glob("*.*")) if path.is_file()}
    for uid, question in decisions.questions.items():
        if missing := [name for name in question.images if name not in pool]:
            raise ValueError(f"{folder / 'pool'} has no picture {missing[0]!r}, which question {uid!r} shows; put it there.")
    return pool


def open_review(
    folder: Path, names: Sequence[str], *, blind: bool = False, adjudicator: bool = False, host: str = "127.0.0.1"
) -> Review:
    """Return what a server shows.

    Raises:
        ValueError: a name or the folder cannot be used, or a name would decide as reviewer and as adjudicator.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"The name {name!r} cannot be used; take up to 40 letters, digits, spaces and . @ _ -.")
    decisions = Decisions(folder)
    for decision in (d for uid in decisions.questions for d in decisions.of(uid)):
        if decision.reviewer in names and decision.adjudicator != adjudicator:
            was = "settled disagreements" if decision.adjudicator else "reviewed"
            raise ValueError(f"{decision.reviewer} has {was} in this folder; an adjudicator is somebody else than the reviewers.")
    token = "" if _loopback(host) else token_of(folder)
    return Review(decisions, pool_of(folder, decisions), tuple(names), blind, adjudicator, host, token)


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def summary(decisions: Decisions) -> str:
    """Return where a review stands, in a few lines."""
    decisions.refresh()
    states = Counter(decisions.settled(uid).state for uid in decisions.questions)
    lines = [f"{name}: {count} of {len(decisions.questions)} questions" for name, count in decisions.progress().items()]
    for pair in decisions.agreement():
        value = "undefined" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        lines.append(f"{' and '.join(pair['reviewers'])}: alike on {pair['alike']} of {pair['questions']}, kappa {value}")
    told = ", ".join(f"{states[state]} {state}" for state in ("kept", "rejected", "disagreed", "open"))
    return "\n".join([*lines, f"With two reviewers: {told}."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(prog="imagent curate --review", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with questions.jsonl and pool/")
    parser.add_argument("--reviewer", action="append", default=[], metavar="NAME", help="who decides; may be given again")
    parser.add_argument("--blind", action="store_true", help="a reviewer answers before the claimed answer is shown")
    parser.add_argument("--adjudicator", action="store_true", help="settle what the reviewers disagree on")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of the page (default: {PORT}; 0: a free one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a token")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser")
    parser.add_argument("--export", action="store_true", help="write decisions.jsonl and end")
    args = parser.parse_args(argv)
    try:
        if args.export:
            print(f"Wrote {export(args.folder)}.")
            return 0
        if not args.reviewer:
            raise ValueError("Nobody is named; say who reviews: --reviewer NAME.")
        review = open_review(args.folder, args.reviewer, blind=args.blind, adjudicator=args.adjudicator, host=args.host)
        server = _listening(review, args.port)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    serve(server, args.folder, open_page=not args.no_open)
    return 0


def _listening(review: Review, port: int) -> Server:
    try:
        return Server(review, port)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{review.host}:{port} cannot be listened on ({error}); give another --port or --host.") from None


def serve(server: Server, folder: Path, open_page: bool) -> None:
    """Serve until Ctrl-C, then say where the review stands."""
    review, shown = server.review, server.review.host
    with contextlib.suppress(ValueError):
        shown = socket.gethostname() if ipaddress.ip_address(shown).is_unspecified else f"[{shown}]" if ":" in shown else shown
    decisions = review.decisions
    what = "what reviewers disagree on" if review.adjudicator else f"{len(decisions.questions)} questions"
    print(f"Showing {what} of {folder}. Decisions go to {decisions.path}. Ctrl-C ends; nothing is lost.")
    for name in review.reviewers:
        query = urllib.parse.urlencode({"reviewer": name} | ({"token": review.token} if review.token else {}))
        url = f"http://{shown}:{server.server_port}/?{query}"
        print(f"{name}: {url}", flush=True)
        if open_page:
            webbrowser.open(url)
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever(poll_interval=0.2)
    print(f"\n{summary(decisions)}\n`--export` writes the decisions to {folder / 'decisions.jsonl'}.")
    decisions.close()


if __name__ == "__main__":
    sys.exit(main())
