"""Search for passages: a local index, a server that speaks Search-R1's `POST /retrieve`, or Serper's web search.

A backend is an object with `search(query, k) -> list[Hit]`. `hits` defines both, `index` builds and reads a local index, `remote`
asks servers and keeps their answers, `serve` is a server of ours, `tool` is what the policy calls.
"""

from imagent_jax.tools.search.hits import Backend, Hit, SearchError
from imagent_jax.tools.search.index import Index
from imagent_jax.tools.search.tool import open_backend, search_tool

__all__ = ["Backend", "Hit", "Index", "SearchError", "open_backend", "search_tool"]
