"""An agent behind an OpenAI-compatible server: `Endpoint(EndpointConfig(model="...")).complete(messages, schema)`.

Every answer is kept on disk by content: a run that is stopped, killed or repeated gets the kept answers and asks only for the
rest. Requests are not streamed, because a cut stream of events cannot be told from its end; a cut body can.
"""

import contextlib
import email.utils
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagent_jax.config.settings import setting
from imagent_jax.curation.agents import AgentError
from imagent_jax.tools.kept import keep, kept_path, read_kept
from imagent_jax.tools.post import check_url, clean
from imagent_jax.types import quote

LONGEST_WAIT = 600.0
"""Most seconds between two requests, whatever the server's Retry-After says."""
MOST_BYTES = 8 << 20
FORMS = ("json_schema", "json_object", "prompt")
"""How the schema is told, in the order tried: as the format, beside the format "some JSON", in the prompt alone."""
TELL = "Reply with one JSON object and nothing else. It must match this JSON schema:\n"
MEND = "This reply cannot be used: {why}. Reply again, with one JSON object that matches the schema and nothing else."


@dataclass(frozen=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible server (needs the extra curation)."""

    base_url: str = setting("http://localhost:8000/v1", "address of the server, up to /v1")
    model: str = setting("", "name of the model on that server")
    key_env: str = setting("", "environment variable that holds the server's key ('': it needs none)")
    parallel: int = setting(16, "requests at once", least=1)
    timeout_s: float = setting(120.0, "seconds a request may take", above=0)
    retries: int = setting(6, "further requests where one fails or its answer does not match the schema", least=0)
    backoff_s: float = setting(1.0, "seconds before the first further request; doubled for each one after it", least=0)
    temperature: float | None = setting(None, "sampling temperature (null: the server's own)", least=0)
    seed: int | None = setting(None, "seed of sampling (null: the server's own); another seed is another answerer")
    max_tokens: int | None = setting(None, "most tokens of an answer (null: the server's own)", least=1)
    cache_dir: str = setting("~/.cache/imagent_jax/curation", "where answers are kept; several processes may share it")

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings that are set, as they stand in a request."""
        named = {"temperature": self.temperature, "seed": self.seed, "max_tokens": self.max_tokens}
        return {name: value for name, value in named.items() if value is not None}


class Unusable(ValueError):
    """The model replied, but not with an object of the schema. Attributes: `reply`, what it said."""

    def __init__(self, why: str, reply: str):
        super().__init__(why)
        self.reply = reply


class Endpoint:
    """The agent of a configuration; `complete` may be called from many threads. `counts` says what was asked so far.

    `counts` has `items` (calls of `complete`), `kept` (answered from disk), `calls` (requests), `retries`, `prompt_tokens` and
    `completion_tokens` (of this process, as the server counts them).

    Raises:
        ValueError: openai or jsonschema is not installed, or the address, the model or the key is missing.
    """

    Settings = EndpointConfig

    def __init__(self, cfg: EndpointConfig):
        try:
            import jsonschema  # noqa: F401 - schemas of roles are whole JSON schemas; `tools.schema` knows those of functions
            import openai
        except ImportError as error:
            raise ValueError(f'{error.name} is not installed; run pip install "imagent-jax[curation]".') from None
        if not cfg.model:
            raise ValueError(f"The model of the server {cfg.base_url} is not named; set model.")
        key = os.environ.get(cfg.key_env, "") if cfg.key_env else "none"
        if not key:
            raise ValueError(f"The environment variable {cfg.key_env}, which key_env names, is not set; export the key in it.")
        self.cfg, self.folder = cfg, Path(cfg.cache_dir).expanduser()
        self.client = openai.OpenAI(
            base_url=check_url(cfg.base_url, "base_url", "http://localhost:8000/v1"),
            api_key=key,
            max_retries=0,
            timeout=cfg.timeout_s,
        )
        self.refused = (openai.BadRequestError, openai.UnprocessableEntityError)
        self._slots, self._lock, self._stop = threading.BoundedSemaphore(cfg.parallel), threading.Lock(), threading.Event()
        self._running: dict[Path, Future[str]] = {}
        self._counts, self._form, self._not_before, self._dead = Counter(), 0, 0.0, ""

    @property
    def counts(self) -> dict[str, int]:
        """What was asked so far."""
        names = ("items", "kept", "calls", "retries", "prompt_tokens", "completion_tokens")
        with self._lock:
            return {name: self._counts[name] for name in names}

    def close(self) -> None:
        """End waiting and running requests with an error. Kept answers stay."""
        self._stop.set()
        self.client.close()

    def path(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> Path:
        """Return the file of an answer, by model, messages, schema and sampling settings."""
        return kept_path(self.folder, self.cfg.model, list(messages), schema, self.cfg.sampling)

    def complete(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's answer, an object that matches the schema: the one on disk, or a new one.

        Args:
            messages: OpenAI's messages, with parts `text` and `image_url` (data: addresses).
            schema: JSON schema of an object.
        Raises:
            AgentError: there is no such answer, or it cannot be kept.
        """
        path = self.path(messages, schema)
        with self._lock:
            self._counts["items"] += 1
            running = self._running.get(path)
            if first := running is None:
                running = self._running[path] = Future()
        if first:
            try:
                running.set_result(self._kept_or_asked(path, messages, schema))
            except BaseException as error:
                running.set_exception(error)
            finally:
                with self._lock:
                    del self._running[path]
        return json.loads(running.result())

    def check(self) -> None:
        """Ask something simple, once: the address, the key and the model are right. A kept answer suffices.

        Raises:
            AgentError: they are not.
        """
        schema = {
            "type": "object",
            "properties": {"ready": {"type": "boolean"}},
            "required": ["ready"],
            "additionalProperties": False,
        }
        self.complete([{"role": "user", "content": 'Reply with {"ready": true}.'}], schema)

    # ---- one answer ------------------------------------------------------------------------------------------------

    def _kept_or_asked(self, path: Path, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> str:
        """Return an answer as JSON, as it stands on disk."""

        def answer(record: Any) -> str:
            return json.dumps(read_answer(json.dumps(record["answer"]), schema))

        try:
            if (kept := read_kept(path, answer)) is not None:
                with self._lock:
                    self._counts["kept"] += 1
                return kept
            keep(path, self._ask(messages, schema) | {"model": self.cfg.model})
            kept = read_kept(path, answer)
        except OSError as error:
            raise AgentError(f"An answer cannot be kept in {path} ({error}); make room, or set another cache_dir.") from None
        if kept is None:
            raise AgentError(f"The answer that was just written to {path} cannot be read; set another cache_dir.")
        return kept

    def _ask(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return `answer` and `usage`, after up to `retries` further requests."""
        import openai

        talk, failure = list(messages), Exception("nothing was asked")
        with self._slots:
            for attempt in range(self.cfg.retries + 1):
                if attempt:
                    self._wait(min(self.cfg.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0), 60.0))
                self._wait(0.0)
                with self._lock:
                    self._counts["retries"] += bool(attempt)
                try:
                    return self._request(talk, schema)
                except Unusable as error:
                    failure, said = error, {"role": "assistant", "content": error.reply[:4000]}
                    talk = [*messages, said, {"role": "user", "content": MEND.format(why=error)}]
                except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                    self._die(
                        f"{self.cfg.base_url} refuses the key ({_words(error)}); put a valid one into the variable of key_env."
                    )
                except openai.NotFoundError as error:
                    self._die(f"{self.cfg.base_url} has no model {self.cfg.model!r} ({_words(error)}); mend model or base_url.")
                except self.refused as error:
                    raise AgentError(
                        f"{self.cfg.base_url} refuses the request ({_words(error)}); mend the prompt or the settings."
                    ) from None
                except Exception as error:  # of a server or a network: busy, broken, slow, cut, or another protocol
                    failure = error
                    if isinstance(error, openai.APIStatusError):
                        self._hold(_retry_after(error.response.headers))
        if isinstance(failure, openai.APIConnectionError) and not isinstance(failure, openai.APITimeoutError):
            raise AgentError(
                f"There is no server at {self.cfg.base_url} ({_words(failure)}); start it, or mend base_url."
            ) from None
        raise AgentError(
            f"{self.cfg.base_url} gave no answer that can be used in {self.cfg.retries + 1} requests "
            f"({type(failure).__name__}: {_words(failure)})."
        ) from None

    def _request(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
        """Ask once; a server that refuses a form of the schema is asked in the next one, now and from then on."""
        form = self._form
        while True:
            try:
                reply = self._post(messages, schema, FORMS[form])
                break
            except self.refused:
                form += 1
                if form == len(FORMS):
                    raise
        self._form = max(self._form, form)
        choice, used = reply["choices"][0], reply.get("usage") or {}
        usage = {name: int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        with self._lock:
            self._counts.update(usage)
        text = choice["message"]["content"] or ""
        if choice.get("finish_reason") == "length":
            raise Unusable("it is longer than allowed and was cut", text)
        return {"answer": read_answer(text, schema), "usage": usage}

    def _post(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], form: str) -> dict[str, Any]:
        """Return the body of a reply, bounded in time and size."""
        options = dict(self.cfg.sampling)
        if form == "json_schema":
            options["response_format"] = {"type": form, "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        else:
            messages = _told(messages, schema)
            if form == "json_object":
                options["response_format"] = {"type": form}
        with self._lock:
            self._counts["calls"] += 1
        until, data = time.monotonic() + self.cfg.timeout_s, bytearray()
        send: Any = self.client.chat.completions.with_streaming_response.create
        with send(model=self.cfg.model, messages=list(messages), **options) as response:
            for piece in response.iter_bytes():
                data += piece
                if len(data) > MOST_BYTES:
                    raise ValueError(f"it answered more than {MOST_BYTES} bytes")
                if time.monotonic() > until:
                    raise TimeoutError(f"longer than {self.cfg.timeout_s:g} s")
        return json.loads(bytes(data))

    def _wait(self, seconds: float) -> None:
        """Wait so long, and until the time that the server set for all requests."""
        until = time.monotonic() + seconds
        while (left := max(until, self._not_before) - time.monotonic()) > 0 and not self._stop.wait(left):
            pass
        if self._dead or self._stop.is_set():
            raise AgentError(self._dead or "The run was stopped before this answer was asked for.")

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + min(seconds, LONGEST_WAIT))

    def _die(self, sentence: str) -> None:
        """Refuse this answer and every later one: no request of this process can succeed."""
        self._dead = sentence
        raise AgentError(sentence) from None


def read_answer(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object in a reply: the whole as JSON, or what stands from its first { to its last }, after any thinking.

    Raises:
        Unusable: there is none, or it does not match the schema.
    """
    import jsonschema

    text = text.rpartition("</think>")[2]
    why = "it is no JSON object"
    for part in (text, text[text.find("{") : text.rfind("}") + 1]):
        try:
            found = json.loads(part)
            json.dumps(found, allow_nan=False, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
            jsonschema.validate(found, schema)
        except jsonschema.ValidationError as error:
            place = "".join(f"[{step!r}]" for step in error.absolute_path)
            why = f"the schema says otherwise: {place} {' '.join(error.message.split())[:300]}"
        except (ValueError, RecursionError):
            continue
        else:
            if isinstance(found, dict):
                return found
    raise Unusable(f"{why}; it began {quote(text.strip(), 80)}", text)


def _told(messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return messages whose last one ends with the schema."""
    *before, last = messages
    text, content = TELL + json.dumps(schema), last["content"]
    more = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*before, {**last, "content": more}]


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that the header Retry-After asks for, a number or a date; 0: it says nothing."""
    said = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(said)) if said else 0.0
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


def _words(error: Exception) -> str:
    return " ".join(clean(str(error)).split()).rstrip(".")[:200] or "nothing in time"
