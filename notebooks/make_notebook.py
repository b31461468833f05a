"""The notebook from its readable source, executed: `python notebooks/make_notebook.py` writes it with its outputs.

A cell begins at a line `# %%`; what follows it on that line is the cell's first comment. `# %% [markdown]` begins text.
"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SOURCE = Path(__file__).with_name("imagent_demo.py")


def read(text: str) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for i, (title, body) in enumerate(re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", text, re.MULTILINE | re.DOTALL)):
        if title.strip() == "[markdown]":
            cell = nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            cell = nbformat.v4.new_code_cell((f"#{title}\n" if title else "") + body.strip())
        cell.id = f"cell-{i}"  # not a random one, so that building again changes nothing
        notebook.cells.append(cell)
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs every cell in order, in a fresh kernel in this folder. Raises where a cell does."""
    return NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(SOURCE.parent)}}).execute()


if __name__ == "__main__":
    nbformat.write(execute(read(SOURCE.read_text())), SOURCE.with_suffix(".ipynb"))
