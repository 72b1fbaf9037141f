"""From the chapters in nbs/ to the reader's copies: an exercise's solution is cut out of its cell, and folded away below the check.

    python course/exercises.py lab      # writes lab/*.ipynb; a file that is there is yours and stays as it is

The folder stands beside nbs/, so that a path in a chapter, such as ../README.md, leads to the same file from the copy.

An exercise is three cells of a chapter: a task (Markdown, heading `### Exercise`, with a folded hint), a code cell that begins with `#| exercise`,
whose solution stands between `### BEGIN SOLUTION` and `### END SOLUTION` (nbgrader's marks), and a code cell that begins with `#| check`.
"""
import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).parent.parent / "nbs"
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n(.*?)^ *### END SOLUTION *\n?", re.M | re.S)


def begins(cell, directive):
    "Is this a code cell that begins with `#| directive`?"
    return cell.cell_type == "code" and cell.source.split("\n", 1)[0].strip() == f"#| {directive}"


def stub(source):
    "The cell without its solution: what the reader has to fill in."
    assert SOLUTION.search(source), f"an exercise without '### BEGIN SOLUTION' and '### END SOLUTION':\n{source}"
    return SOLUTION.sub(r'\1raise NotImplementedError("your turn")\n', source).rstrip("\n")


def solution(source):
    "The cell as it is, without the marks."
    return SOLUTION.sub(r"\2", source).split("\n", 1)[1].rstrip("\n")


def exercises(cells):
    "Positions of the exercises; each has to be followed by its check."
    for i, cell in enumerate(cells):
        if not begins(cell, "exercise"): continue
        assert i + 1 < len(cells) and begins(cells[i + 1], "check"), f"an exercise that is not followed by a cell '#| check':\n{cell.source}"
        yield i


def said(cells):
    "What the cells print or give back, as text."
    plain = (o for cell in cells for o in cell.outputs if {*o.get("data", {})} <= {"text/plain"})
    texts = ("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in plain)
    return "\n".join(text.strip() for text in texts if text.strip())


def readers_copy(notebook):
    "The notebook with stubs in place of solutions, which are folded away below the checks with what both cells print; other outputs stay."
    cells = list(notebook.cells)
    for i in reversed(list(exercises(cells))):
        answer = f"It prints:\n\n```text\n{text}\n```\n\n" if (text := said(cells[i:i + 2])) else ""
        folded = f"<details><summary>Solution</summary>\n\n```python\n{solution(cells[i].source)}\n```\n\n{answer}</details>"
        cells.insert(i + 2, nbformat.v4.new_markdown_cell(folded, id=f"{cells[i].id}s"))
        cells[i] = nbformat.from_dict(cells[i] | dict(source=stub(cells[i].source).split("\n", 1)[1], outputs=[]))
        cells[i + 1] = nbformat.from_dict(cells[i + 1] | dict(source=cells[i + 1].source.split("\n", 1)[1], outputs=[]))
    return nbformat.from_dict(notebook | dict(cells=cells))


def write_copies(folder):
    "One reader's copy per chapter, and the app, into `folder`; what is already there is not touched."
    for path in sorted([*NBS.glob("*.ipynb"), *NBS.glob("app/*.ipynb")]):
        copy = folder / path.relative_to(NBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists(): nbformat.write(readers_copy(nbformat.read(path, 4)), copy)


if __name__ == "__main__":
    write_copies(Path(sys.argv[1]))
