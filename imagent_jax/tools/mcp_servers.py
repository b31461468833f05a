"""Tools of MCP servers (modelcontextprotocol.io), through the official `mcp` library."""

import asyncio
import base64
import io
import json
import os
import shlex
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from imagent_jax.images.decode import read_image
from imagent_jax.tools.context import ToolContext
from imagent_jax.tools.sandbox.link import SHOWN_PIXELS
from imagent_jax.tools.schema import Tool
from imagent_jax.types import ImageNumber, ToolError

START_S, PING_S = 30.0, 2.0
"""Seconds that a server may take to start and to list its tools, and to answer whether it is there after a call failed."""


class McpServer:
    """One server, shared by all trajectories. A connection that is lost is opened again by the next call; a server that was
    started by a command is then started again.

    Args:
        address: a command that starts a server on its standard input and output, or the URL of a running one.
    """

    def __init__(self, address: str):
        self.address = address
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True).start()
        self._lock = threading.Lock()
        self._client: Any = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the server

    def tools(self) -> list[Any]:
        """Return the server's tools, as `mcp.types.Tool`.

        Raises:
            ValueError: the server does not start, or does not answer.
        """
        try:
            return self._run(self._listed(self._connected()), START_S)
        except Exception as error:
            cause = "; it said: ".join(filter(None, (_cause(error), self._last_words())))
            self.close()
            raise ValueError(
                f"tools.mcp: there is no MCP server at {self.address!r} ({cause}); start it, or mend the command."
            ) from None

    def call(self, name: str, arguments: dict[str, Any], timeout_s: float) -> Any:
        """Call a tool. Returns `mcp.types.CallToolResult`.

        Raises:
            Exception: the server is gone or does not answer in time.
        """
        client = self._connected()
        try:
            return self._run(client.call_tool(name, arguments), timeout_s)
        except Exception:
            with self._lock:
                if self._client is client and not self._alive():
                    self._close()
            raise

    def close(self) -> None:
        """End the connection, and a server that was started by a command."""
        with self._lock:
            self._close()

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._run(self._open(), START_S)
            return self._client

    def _run(self, work, timeout_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {timeout_s:g} s") from None

    async def _open(self) -> Any:
        """Connect in a task that stays: a connection is closed by the task that opened it."""
        opened, self._left = asyncio.get_running_loop().create_future(), asyncio.Event()
        self._task = asyncio.create_task(self._stay(opened, self._left))
        try:
            return await opened
        except BaseException:
            self._task.cancel()  # ends a server that does not answer in time
            raise

    async def _stay(self, opened: asyncio.Future, left: asyncio.Event) -> None:
        try:
            async with self._transport() as client:
                opened.set_result(client)
                await left.wait()
        except BaseException as error:  # noqa: BLE001 - of the connection; whoever waits for it is told
            if not opened.done():
                opened.set_exception(error if isinstance(error, Exception) else ConnectionError(str(error)))

    @asynccontextmanager
    async def _transport(self) -> AsyncGenerator[Any, None]:
        from mcp import Client, StdioServerParameters, stdio_client

        server: Any = self.address
        if "://" not in self.address.split(" ")[0]:
            command, *arguments = shlex.split(self.address)
            server = stdio_client(StdioServerParameters(command=command, args=arguments), errlog=self._errors)
        async with Client(server) as client:
            yield client

    async def _listed(self, client) -> list[Any]:
        found, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                return found

    def _close(self) -> None:
        if self._client is not None:
            self._client, task = None, self._task
            self._loop.call_soon_threadsafe(self._left.set)
            asyncio.run_coroutine_threadsafe(asyncio.wait([task], timeout=5), self._loop).result(10)

    def _alive(self) -> bool:
        try:
            self._run(self._client.list_tools(cache_mode="bypass"), PING_S)
        except Exception:  # noqa: BLE001 - whatever it is, there is no answer
            return False
        return True

    def _last_words(self) -> str:
        """Return the last line that a started server wrote to its standard error."""
        self._errors.seek(0, os.SEEK_SET)
        return next((line.strip()[:200] for line in reversed(self._errors.read().splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class McpTool(Tool):
    """A tool of an MCP server, whose schema may be any JSON schema.

    Attributes:
        validator: see `validator_of`.
    """

    validator: Any = field(default=None, repr=False, compare=False)

    def check(self, arguments: dict[str, Any]) -> None:
        """Check arguments against the schema.

        Raises:
            ToolError: the arguments do not match.
        """
        from jsonschema.exceptions import best_match

        if error := best_match(self.validator.iter_errors(arguments)):
            where = "".join(f"[{part!r}]" for part in error.absolute_path)
            raise ToolError(f"{self.name}: {' '.join(f'{where} {error.message}'.split())[:300]}")


def validator_of(schema: dict[str, Any]) -> Any:
    """Return what checks arguments against a JSON schema. It loads no address.

    Regular expressions are left to the server: in Python, one of them may take forever on a text of the policy.

    Raises:
        jsonschema.SchemaError: the schema is wrong.
        referencing.exceptions.Unresolvable: a `$ref` names nothing in it.
    """
    import jsonschema
    import referencing
    from referencing.jsonschema import DRAFT202012

    kind: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema, format_checker=jsonschema.FormatChecker(()))  # expressions may be JavaScript's
    root = referencing.Resource.from_contents(schema, default_specification=DRAFT202012)
    _check_references(root, referencing.Registry().resolver_with_root(root))
    others = kind.VALIDATORS["additionalProperties"]

    def nothing(*_: Any) -> None:
        """Check nothing."""

    def additional(validator: Any, allowed: Any, instance: Any, schema: Any) -> Any:
        return None if "patternProperties" in schema else others(validator, allowed, instance, schema)

    loose = dict.fromkeys(("pattern", "patternProperties", "unevaluatedProperties"), nothing)
    bounded = jsonschema.validators.extend(kind, loose | {"additionalProperties": additional})
    return bounded(schema, registry=referencing.Registry())


def _check_references(resource: Any, resolver: Any) -> None:
    if isinstance(resource.contents, dict) and isinstance(name := resource.contents.get("$ref"), str):
        resolver.lookup(name)
    for inner in resource.subresources():
        _check_references(inner, resolver.in_subresource(inner))


def mcp_tools(addresses: Sequence[str], characters: int, timeout_s: float) -> list[Tool]:
    """Connect to MCP servers and return their tools.

    Args:
        characters: most characters of text that a call returns.
        timeout_s: seconds that a call may take.
    Raises:
        ValueError: `mcp` is not installed, a server cannot be reached, or the schema of a tool is wrong (one sentence with the
            remedy).
    """
    if addresses:
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise ValueError('tools.mcp is set, but mcp is not installed; run pip install "imagent-jax[mcp]".') from None
    servers = [McpServer(address) for address in addresses]
    return [_tool(server, found, characters, timeout_s) for server in servers for found in server.tools()]


def _tool(server: McpServer, found: Any, characters: int, timeout_s: float) -> Tool:
    def function(context: ToolContext, /, **arguments: Any) -> list[str | ImageNumber]:
        result = server.call(found.name, arguments, context.own.timeout_s or timeout_s)
        text = text_of(result, found.name)
        text = text if len(text) <= characters else f"{text[:characters]}… ({len(text) - characters} more characters)"
        if result.is_error:
            raise ToolError(" ".join(text.split()) or f"{found.name} failed")
        files = [part.data for part in result.content if part.type == "image"]
        shown = list(_show(context, files, found.name))
        return [*([text] if text or not shown else []), *shown]

    try:
        validator = validator_of(found.input_schema)
    except Exception as error:
        raise ValueError(
            f"tools.mcp: the tool {found.name} of the MCP server at {server.address!r} has a schema that cannot be used "
            f"({_cause(error)}); mend it there."
        ) from None
    schema = {"type": "object", "properties": {}, "required": []} | found.input_schema
    body = {"name": found.name, "description": found.description or found.name, "parameters": schema}
    return McpTool(found.name, function, {"type": "function", "function": body}, validator=validator)


def text_of(result: Any, name: str) -> str:
    """Return the text of a result. Without text and images, it is the structured content, or says that there is none."""
    found = [getattr(getattr(part, "resource", part), "text", None) for part in result.content]
    texts = [text for text in found if text is not None]
    if texts or any(part.type == "image" for part in result.content):
        return "\n".join(texts).strip()
    if result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    kinds = ", ".join(dict.fromkeys(part.type for part in result.content))
    return f"{name} returned nothing that can be read" + (f" ({kinds})" if kinds else "") + "."


def _show(context: ToolContext, files: Sequence[str], name: str) -> Iterator[ImageNumber]:
    """Decode images one by one, as far as there is room for them.

    Raises:
        ToolError: there are more images or pixels than can be shown; none is decoded beyond.
    """
    limit, pixels = context.settings.max_images, 0
    if len(context.registry) + len(files) > limit:
        raise ToolError(f"no more than {limit} images; answer with what you have seen")
    for file in files:
        data = base64.b64decode(file)
        with Image.open(io.BytesIO(data)) as image:  # reads no pixels
            pixels += image.width * image.height
        if pixels > SHOWN_PIXELS:
            raise ToolError(f"{name} returned images of more than {SHOWN_PIXELS} pixels, which is too large to show")
        yield context.show(read_image(data), origin=name)


def _cause(error: BaseException) -> str:
    """Return an error in a few words; of a group, its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
