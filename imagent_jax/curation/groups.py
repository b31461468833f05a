"""Groups of images that questions are about: alike, of one value of a column, or drawn at random."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from imagent_jax.config import import_path
from imagent_jax.curation.likeness import histogram, unit
from imagent_jax.curation.pool import Pool
from imagent_jax.curation.settings import GroupSettings


class Group(NamedTuple):
    """Images that are shown together, in order, and how they were chosen."""

    name: str
    images: tuple[str, ...]
    way: str


def make_groups(cfg: GroupSettings, pool: Pool, seed: int) -> list[Group]:
    """Return groups of the pool's pictures. No picture is in two groups, so that no picture can be in both splits.

    A function of the pool, the settings and the seed. A way that finds too few pictures leaves the rest to the others.

    Raises:
        ValueError: there are too few pictures, no picture has a column that a way names, or no group can be made.
    """
    rng, left = np.random.default_rng((seed, 1)), sorted(pool.pictures)
    if len(left) < min(cfg.sizes):
        raise ValueError(f"The pool has {len(left)} pictures, and a group takes {min(cfg.sizes)}; name a larger source.")
    for way in set(cfg.ways) - {"similar", "random"}:
        if not any(way in picture.facts for picture in pool.pictures.values()):
            raise ValueError(f"groups.ways names the column {way!r}, which no picture has; use similar, random, or a column.")
    near = _neighbours(cfg, pool, left) if "similar" in cfg.ways else None
    left = [left[i] for i in rng.permutation(len(left))]
    groups: list[Group] = []
    ways, shares = list(cfg.ways), np.array(list(cfg.ways.values()))
    size = int(rng.choice(cfg.sizes))
    while ways and len(left) >= min(cfg.sizes):
        size = min(size, max(s for s in cfg.sizes if s <= len(left)))
        way = ways[int(rng.choice(len(ways), p=shares / shares.sum()))]
        sizes = sorted({s for s in cfg.sizes if s <= size}, reverse=True)
        if chosen := next((found for s in sizes if (found := _chosen(way, s, left, pool, near))), []):
            taken = set(chosen)
            left = [picture for picture in left if picture not in taken]
            groups.append(Group(f"group-{len(groups):05d}", tuple(chosen), way))
            size = int(rng.choice(cfg.sizes))
        else:
            keep = [i for i, other in enumerate(ways) if other != way]
            ways, shares = [ways[i] for i in keep], shares[keep]
    if not groups:
        raise ValueError(
            f"No {min(cfg.sizes)} pictures have one value of {' or '.join(cfg.ways)}; add similar or random to groups.ways."
        )
    return groups


def _chosen(
    way: str, size: int, left: Sequence[str], pool: Pool, near: Callable[[str, Sequence[str]], list[str]] | None
) -> list[str]:
    """Return the images of a group by a way; [] where there are too few."""
    if way == "random":
        return list(left[:size])
    if way == "similar":
        return [left[0], *near(left[0], left[1:])[: size - 1]] if near else []
    by_value: dict[str, list[str]] = defaultdict(list)
    for picture in left:
        if value := pool.pictures[picture].facts.get(way):
            by_value[value].append(picture)
            if len(by_value[value]) == size:
                return by_value[value]
    return []


def _neighbours(cfg: GroupSettings, pool: Pool, ids: Sequence[str]) -> Callable[[str, Sequence[str]], list[str]]:
    embed = import_path(cfg.embedding, "groups.embedding") if cfg.embedding else histogram
    vectors, place = unit([embed(pool.image(picture)) for picture in ids]), {picture: i for i, picture in enumerate(ids)}

    def near(picture: str, others: Sequence[str]) -> list[str]:
        """Return the others by their cosine with the picture, greatest first. The table of all pairs would not fit."""
        cosines = vectors[[place[other] for other in others]] @ vectors[place[picture]]
        return [others[i] for i in np.argsort(-cosines, kind="stable")]

    return near
