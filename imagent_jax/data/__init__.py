"""Tasks from the formats people bring, and pipelines over them."""
