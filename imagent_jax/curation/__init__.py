"""MIFG-QA: agents that make multi-image questions, filters, human review, release."""
