"""Requests to a configured server: JSON out, JSON back, bounded in time and size. They go to that address and nowhere else."""

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Generator, Mapping
from typing import Any

from imagent_jax.tools.pool import limited

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Return a text without control characters; half a surrogate pair becomes "?". Tabs and line ends stay."""
    return _CONTROLS.sub("", text.encode("utf-8", "replace").decode())


@contextlib.contextmanager
def _connected(url: str, timeout_s: float) -> Generator[http.client.HTTPConnection]:
    """Connect to a server, by no proxy, whatever the environment says. After `timeout_s` the connection is cut: whoever waits for
    it reads its end."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection, until = kind(parts.hostname or "", parts.port), time.monotonic() + timeout_s
    address = connection.host, connection.port  # looking a name up has no time limit of its own
    plain = limited(lambda: socket.create_connection(address, timeout_s), timeout_s)
    with plain, plain.dup() as other, contextlib.closing(connection):  # the same connection, also where `plain` is encrypted
        timer = threading.Timer(max(until - time.monotonic(), 0), _cut, [other])
        timer.daemon = True
        timer.start()
        try:
            secure = isinstance(connection, http.client.HTTPSConnection)
            connection.sock = (
                ssl.create_default_context().wrap_socket(plain, server_hostname=connection.host) if secure else plain
            )
            yield connection
        finally:
            timer.cancel()


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def post(
    url: str,
    body: Mapping[str, Any],
    timeout_s: float,
    *,
    raises: type[Exception],
    setting: str,
    headers: Mapping[str, str] | None = None,
    most_bytes: int = 8 << 20,
) -> Any:
    """Send JSON and return the JSON of the answer.

    Args:
        raises: class of the environment error where there is no answer within `timeout_s`, a status other than 200, an answer of
            more than `most_bytes`, or one that is no JSON.
        setting: the setting that names the address, for the sentence.
    """
    parts, until = urllib.parse.urlsplit(url), time.monotonic() + timeout_s
    sent = {"Content-Type": "application/json", "Connection": "close", **(headers or {})}
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    try:
        with _connected(url, timeout_s) as connection:
            connection.request("POST", path, json.dumps(body), sent)
            with connection.getresponse() as response:
                if response.status != 200:
                    where = f"; set {setting} to the final address" if 300 <= response.status < 400 else ""
                    raise raises(f"{url} answered {response.status} {response.reason[:100]}{where}. {_said(response)}")
                data = bytearray()
                while piece := response.read1(65536):
                    data += piece
                    if len(data) > most_bytes:
                        raise raises(f"{url} answered more than {most_bytes} bytes.")
                if time.monotonic() >= until:  # a cut reads like an end
                    raise TimeoutError(f"longer than {timeout_s:g} s")
                if response.length:
                    raise raises(f"{url} answered 200 and broke off.")
        return json.loads(bytes(data))
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        late = time.monotonic() >= until and not isinstance(error, TimeoutError)
        cause = TimeoutError(f"longer than {timeout_s:g} s") if late else error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise raises(f"{url} gave no answer that can be used ({reason}).") from None


def _said(response: http.client.HTTPResponse) -> str:
    """Return the beginning of an answer's text on one line, as far as it can be read."""
    try:
        return " ".join(clean(response.read(200).decode("utf-8", "replace")).split())
    except (OSError, http.client.HTTPException, ValueError):
        return ""


def check_url(url: str, setting: str, example: str) -> str:
    """Return a valid address.

    Raises:
        ValueError: it is not the address of a server.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{setting} is {url!r}; give a full address, such as {example}.")
    return url
