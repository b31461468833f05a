"""Tasks: data formats, and pipelines over them."""
