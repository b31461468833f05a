"""Your own tasks as a benchmark, in any format that training reads (docs/data.md). There is no published rule."""

from imagent_jax.data.check import RowError
from imagent_jax.data.formats import Fields, Row, fields_of, format_of
from imagent_jax.evals.benchmark import Benchmark, with_letter
from imagent_jax.evals.rules import Metric, by_type


def read(row: Row) -> Fields:
    if (form := format_of(row)) is None:
        raise RowError("unknown columns", f"the columns {', '.join(row)} are of no format known here (docs/data.md)")
    return fields_of(row, form)


OWN = Benchmark(
    name="own",
    title="your own tasks",
    needs=(),
    read=read,
    metrics={"": Metric(None, by_type)},
    template=with_letter(""),
    lettered=False,
)
