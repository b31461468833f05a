"""The judge in evaluation: a language model scores the replies to a benchmark (`rl.llm_judge`)."""

import asyncio
from collections.abc import Sequence

from imagent_jax.config import JudgeConfig
from imagent_jax.evals.harness import Record
from imagent_jax.rl.llm_judge import LONGEST, LLMJudge
from imagent_jax.types import Task


def judge_replies(cfg: JudgeConfig, tasks: Sequence[Task], records: Sequence[Record]) -> None:
    """Add `judged` to every sample, the judge's score in 0..1, or `judge_fault`, why there is none. Replies are kept on disk.

    Of a reply of more than `LONGEST` characters, the judge reads the end.

    Raises:
        ValueError: the judge does not answer a question whose answer is known; see `LLMJudge`.
    """
    samples = [(task, sample) for task, record in zip(tasks, records, strict=True) for sample in record["samples"]]

    async def scores() -> list[float | BaseException]:
        judge = LLMJudge(cfg)
        await judge.check()
        return await judge.scores([(task, sample["reply"] and sample["reply"][-LONGEST:]) for task, sample in samples])

    for (_, sample), score in zip(samples, asyncio.run(scores()), strict=True):
        if isinstance(score, BaseException):
            sample["judge_fault"] = " ".join(str(score).split())[:200]
        else:
            sample["judged"] = round(float(score), 6)
