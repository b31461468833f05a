"""Communication of a compiled program (from its HLO text) and FLOPs of a traced program (from its jaxpr).

The HLO text contains every collective once. A collective inside a loop is multiplied by the trip count, which the text gives
as `known_trip_count` or, on TPUs, as a comparison with a constant. A loop of unknown length counts once: the decode loop,
which stops when all rows have stopped, is thus counted for one token.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # other names end in their number of bits: s32, u8, s4
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BELOW = re.compile(r"ROOT .* compare\(.*%?(constant[\w.\-]*)\), direction=LT")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+|f8\w+)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")


class Collective(NamedTuple):
    """All collectives of one kind and group size: number of executions and total bytes of the unsharded arrays.

    Attributes:
        kind: one of `KINDS`.
        size: devices per group.
        count: executions.
        bytes: total bytes of the unsharded arrays.
    """

    kind: str
    size: int
    count: int
    bytes: int

    @property
    def wire(self) -> float:
        """Lower bound on the bytes a device receives: (size - 1) / size of the array, twice that for an all-reduce."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (2 if self.kind == "all-reduce" else 1) * (self.size - 1) / self.size


def collectives(text: str) -> list[Collective]:
    """Return the collectives that one device runs, grouped by kind and group size.

    `bytes` counts unsharded arrays: the result of an all-gather, the operand of a reduce-scatter, the array of an all-reduce.

    Args:
        text: HLO text of a compiled program (`compiled.as_text()`).
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, int], list[int]] = {}
    seen: set[str] = set()

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            if (match := _COLLECTIVE.search(line)) and (size := _group_size(line)) > 1:
                channel = _CHANNEL.search(line)
                if channel is None or channel[0] not in seen:  # a fused collective can appear at its start and at its end
                    seen.update([channel[0]] if channel else ())
                    whole = _bytes(match[1], started=bool(match[3])) * (size if match[2] == "reduce-scatter" else 1)
                    total = found.setdefault((match[2], size), [0, 0])
                    total[0], total[1] = total[0] + times, total[1] + times * whole
            called = [(n, _trips(line, computations) if kind == "body" else 1) for kind, n in _CALLED.findall(line)]
            called += [(n.strip().lstrip("%"), 1) for names in _BRANCHES.findall(line) for n in names.split(",")]
            for callee, repeats in called:
                walk(callee, times * repeats)

    walk(entry, 1)
    return [Collective(kind, size, *total) for (kind, size), total in sorted(found.items())]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation by name, and the name of the entry computation."""
    parts, entry, name = {}, "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            parts[name], entry = [], name if head[1] else entry
        elif name:
            parts[name].append(line)
    return parts, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Return the trip count of the `while` on a line, 1 if it is unknown."""
    if known := _TRIPS.search(line):
        return int(known[1])
    named = re.search(r"condition=%?([\w.\-]+)", line)
    condition = "\n".join(computations.get(named[1], ()) if named else ())
    if limit := _BELOW.search(condition):
        constant = re.search(rf"%?{re.escape(limit[1])} = s32\[\][^ ]* constant\((\d+)\)", condition)
        return int(constant[1]) if constant else 1
    return 1


def _bytes(shapes: str, started: bool) -> int:
    """Return the bytes of an array or a tuple of arrays; for an asynchronous start (operands, results, ...), of the largest."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * (_BITS.get(kind) or int(re.findall(r"\d+", kind)[0])) // 8
        for kind, dims in _ARRAY.findall(shapes)
    ]
    return max(sizes, default=0) if started else sum(sizes)


def _group_size(line: str) -> int:
    """Return the devices per replica group: `{{0,1},{2,3}}`, `[groups,size]<=[...]` or `mesh['a'=2,'b'=4] {'b'}`.

    A permutation has size 2 (sender and receiver).
    """
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # part of an axis: 'a':(before)size
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 2 if "source_target_pairs=" in line else 1


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def matrix_flops(jaxpr, pairs: Callable[[int, int], float]) -> float:
    """Return the FLOPs of all matrix products of a traced program, summed over all chips, recomputation included.

    A loop of unknown length counts once. The products of an attention kernel count only for unmasked query-key pairs.

    Args:
        pairs: number of unmasked pairs of a kernel, from its numbers of queries and keys (`kernel_pairs`).
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        kind, params = eqn.primitive.name, eqn.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
        elif kind == "pallas_call":
            shapes = [v.aval.shape for v in eqn.invars if v.aval.ndim > 2 and jnp.issubdtype(v.aval.dtype, jnp.floating)]
            width, lengths = shapes[0][-1], [shape[-2] for shape in shapes if shape[-1] == shapes[0][-1]]
            heads = max(np.prod(shape[:-2]) for shape in shapes)
            total += 2 * _count_dots(params["jaxpr"]) * heads * width * pairs(min(lengths), max(lengths))
        else:
            inner = [matrix_flops(j, pairs) for j in _inner(params)]
            mesh = params["mesh"].shape if kind == "shard_map" else {}
            times = params["length"] if kind == "scan" else np.prod([mesh[a] for a in mesh if a in params["newly_manual_axes"]])
            total += times * (max(inner) if kind == "cond" and inner else sum(inner))
    return float(total)


def _inner(params: dict) -> list:
    parts = [x for value in params.values() for x in (value if isinstance(value, (tuple, list)) else (value,))]
    return [getattr(x, "jaxpr", x) for x in parts if hasattr(getattr(x, "jaxpr", x), "eqns")]


def _count_dots(jaxpr) -> int:
    return sum((e.primitive.name == "dot_general") + sum(map(_count_dots, _inner(e.params))) for e in jaxpr.eqns)


def kernel_pairs(group_size: int, vision: bool) -> Callable[[int, int], float]:
    """Return a function that counts the unmasked query-key pairs of an attention kernel.

    Vision attention is bidirectional. A prompt is causal. With more keys than queries, the queries are G responses; each sees the
    whole prompt and, causally, itself.
    """

    def pairs(queries: int, keys: int) -> float:
        g, own = (group_size, queries / group_size) if keys > queries else (1, queries)
        return queries**2 if vision else queries * (keys - queries) + g * own * (own + 1) / 2

    return pairs
