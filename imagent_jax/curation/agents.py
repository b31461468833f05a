"""Agents that make, answer and attack questions."""


class AgentError(Exception):
    """An agent gave no answer that can be used; the message is one sentence."""
