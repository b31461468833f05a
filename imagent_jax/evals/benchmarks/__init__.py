"""Published benchmarks: a module for each family says how rows become tasks and how replies are scored."""

from imagent_jax.config import import_path
from imagent_jax.evals.benchmark import Benchmark

TABLE = {
    "muirbench": "muirbench:BENCHMARK", "blink": "blink:BENCHMARK", "mantis": "mantis:BENCHMARK", "mirb": "mirb:BENCHMARK",
    "mmiu": "mmiu:BENCHMARK", "remi": "remi:BENCHMARK", "vstar": "vstar:BENCHMARK", "hrbench-4k": "hrbench:HR_4K",
    "hrbench-8k": "hrbench:HR_8K", "treebench": "treebench:BENCHMARK", "mme-realworld-lite": "mme_realworld:BENCHMARK",
    "visualprobe": "o3bench:VISUALPROBE", "o3-bench": "o3bench:O3", "insight-o3": "o3bench:COMMON",
    "mmbench": "vlmevalkit:MMBENCH",
    "seedbench": "vlmevalkit:SEED", "mat-coding": "mat:MAT_CODING", "mat-search": "mat:MAT_SEARCH", "2wiki": "mat:TWO_WIKI",
    "hotpotqa": "mat:HOTPOTQA", "musique": "mat:MUSIQUE", "bamboogle": "mat:BAMBOOGLE", "mmsearch": "mmsearch:MMSEARCH",
    "mi-mmsearch": "mmsearch:MI_MMSEARCH", "tir-bench": "tir_bench:BENCHMARK", "tsv": "vlmevalkit:TSV", "own": "own:OWN",
}  # fmt: skip
"""Every benchmark: where it is declared, in this package."""


def named(spec: str) -> tuple[Benchmark, str]:
    """Return the benchmark that "NAME" or "NAME=PATH" names, and its path ("": its data set on the hub).

    Raises:
        ValueError: there is no such benchmark.
    """
    name, _, path = spec.partition("=")
    if name not in TABLE:
        raise ValueError(f"There is no benchmark {name!r}; use one of {', '.join(TABLE)}, or own=PATH for your own tasks.")
    return import_path(f"{__name__}.{TABLE[name]}", "benchmark"), path
