"""Requests to a configured server: JSON out, JSON back, bounded in time and size. They go to that address and nowhere else."""

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Return a text without control characters; half a surrogate pair becomes "?". Tabs and line ends stay."""
    return _CONTROLS.sub("", text.encode("utf-8", "replace").decode())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing: the answer itself is then an error."""


# no proxies either, whatever the environment says
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


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
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})
    until = time.monotonic() + timeout_s
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            data = bytearray()
            while piece := response.read1(65536):
                data += piece
                if len(data) > most_bytes:
                    raise raises(f"{url} answered more than {most_bytes} bytes.")
                if time.monotonic() > until:
                    raise TimeoutError(f"longer than {timeout_s:g} s")
            if response.status != 200 or response.length:
                raise raises(f"{url} answered {response.status}{' and broke off' if response.length else ''}.")
        return json.loads(bytes(data))
    except urllib.error.HTTPError as error:
        said = clean(error.read(200).decode("utf-8", "replace"))
        where = f"; set {setting} to the final address" if 300 <= error.code < 400 else ""
        raise raises(f"{url} answered {error.code} {error.reason}{where}. {said}") from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise raises(f"{url} gave no answer that can be used ({type(error).__name__}: {error}).") from None


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
