"""An MCP server for the tests: python mcp_server.py [port]; without a port it speaks on its standard input and output."""

import io
import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from PIL import Image as Pixels

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def draw(colour: str, side: int = 64):
    """Draw a square."""
    out = io.BytesIO()
    Pixels.new("RGB", (side, side), colour).save(out, "PNG")
    return ["a square", Image(data=out.getvalue(), format="png")]


@server.tool()
def say(text: str) -> str:
    """Say something."""
    return text


@server.tool()
def fail(reason: str) -> str:
    """Fail."""
    raise ValueError(reason)


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def wait(seconds: float) -> str:
    """Take a while."""
    time.sleep(seconds)
    return "done"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
