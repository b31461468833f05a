"""A policy as an agent that answers."""

import re
from types import SimpleNamespace

import jax
import pytest

from imagent_jax.curation.agents import AgentError, load_backend
from imagent_jax.curation.roles import LOOKING, SCHEMAS, _picture, _text
from imagent_jax.tiny.world import task_at
from imagent_jax.types import EndReason

TASK = next(task for task in (task_at(0, "test", n) for n in range(40)) if task.kind == "colour")


def conversation(who="answerer 1"):
    shown = [part for n, data in enumerate(TASK.images, 1) for part in (_text(f"Image {n}:"), _picture(data))]
    words = _text(f"Question: {TASK.question}\n\nYou are {who}.")
    return [{"role": "system", "content": "x"}, {"role": "user", "content": [*shown, words]}]


def backend(policy, monkeypatch):
    monkeypatch.setattr("imagent_jax.runs.loading.load_policy", lambda path, settings: (policy,))
    return load_backend("imagent_jax.curation.policy:PolicyAnswerer", {"temperature": 0.2}, "agents.backend")


@pytest.mark.slow(10)
def test_the_tiny_base_answers_a_question_about_its_images(parts, monkeypatch):
    answerer = backend(parts, monkeypatch)
    found = answerer.complete(conversation(), LOOKING)
    assert found == answerer.complete(conversation(), LOOKING) and found["look"] is None and found["sure"] is True
    assert re.fullmatch(r"Image [1-4]", found["answer"]) and int(found["answer"][-1]) <= len(TASK.images)


def test_what_is_asked_of_the_policy_is_the_question_alone_with_its_images(monkeypatch):
    asked, ends = [], {"end": EndReason.ANSWERED, "answer": "7", "error": None}

    class Collector:
        def collect(self, params, tasks, **options):
            asked.append((tasks, options))
            if len(tasks[0].images) > 9:
                raise ValueError("the prompt needs 900 tokens")
            return SimpleNamespace(trajectories=[[SimpleNamespace(**ends)]])

    mesh = jax.make_mesh((1,), ("data",))
    answerer = backend(SimpleNamespace(collector=Collector(), params="weights", mesh=mesh), monkeypatch)
    assert answerer.complete(conversation(), SCHEMAS["answerer"]) == {"answer": "7", "sure": True, "look": None}
    answerer.complete(conversation("answerer 2"), SCHEMAS["answerer"])
    [one], [two] = (tasks for tasks, _ in asked)
    assert (one.question, one.images) == (TASK.question, TASK.images) == (two.question, two.images)
    assert asked[0][1]["seed"] != asked[1][1]["seed"] and asked[0][1]["temperature"] == 0.2
    ends |= {"answer": None, "end": EndReason.VOID}
    assert answerer.complete(conversation(), SCHEMAS["text_attack"]) == {"answer": "cannot tell", "sure": False, "look": None}
    ends |= {"end": EndReason.FAULT, "error": "Traceback\n  x\nOSError: disk full"}
    with pytest.raises(AgentError, match="A tool of the policy failed: OSError: disk full"):
        answerer.complete(conversation(), SCHEMAS["answerer"])
    many = [{"role": "user", "content": [*conversation()[1]["content"][:2] * 10, _text("Question: ?")]}]
    with pytest.raises(AgentError, match="cannot be asked: the prompt needs 900 tokens"):
        answerer.complete(many, SCHEMAS["answerer"])
    with pytest.raises(AgentError, match=r"cannot make a proposal; set agents\.roles"):
        answerer.complete(conversation(), SCHEMAS["proposer"])
