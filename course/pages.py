"""From the chapters in nbs/ to web pages that need no network to be read, and no server (`make site`).

    python course/pages.py site      # writes site/index.html and what belongs to it

A page is the reader's copy of its chapter as it was committed: nothing is executed, neither torch nor anogan is needed. sphinx makes the pages;
conf.py tells it how. MathJax, which draws the formulas, is no Python package: npm fetches it once into build/vendor.
"""
import html
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from exercises import readers_copy
from markdown_it import MarkdownIt

COURSE = Path(__file__).resolve().parent
ROOT, NBS = COURSE.parent, COURSE.parent / "nbs"
MATHJAX = ROOT / "build" / "vendor" / "tex-svg-full.js"
MATHJAX_PACKAGE = "mathjax@3.2.2"
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()#\s]+)((?:#[^()\s]*)?)\)")
FOLDED = re.compile(r"^(\d+\. +)?<details><summary>(.*?)</summary>(?:(.+)</details>)?$", re.M)


def code_cell(cell):
    "The cell without its directives, pictures with their alternative text; None where it is not for the reader."
    directives = re.findall(r"^#\|\s*(\w+)", cell.source, re.M)
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    if not source or {"hide", "default_exp"} & {*directives}: return None
    tags = ["export"] if "export" in directives else []
    return nbformat.from_dict(cell | dict(source=source, metadata=dict(tags=tags), outputs=[*map(picture, cell.outputs)]))


def picture(output):
    "An output with a PNG as HTML that says what the picture shows: sphinx would drop the text. Other outputs as they are."
    png = output.get("data", {}).get("image/png")
    if not png: return output
    alt = html.escape(output.metadata.get("image/png", {}).get("alt", ""))
    return nbformat.from_dict(output | dict(data={"text/html": f'<img class="figure" alt="{alt}" src="data:image/png;base64,{"".join(png.split())}">'}))


def unfolded(match):
    "Markdown between <details> and </details>, where a page would take a line for HTML: code, formulas and links are shown as such."
    number, title, text = match.groups()
    space = " " * len(number or "")
    head = f"{number or ''}<details><summary>{MarkdownIt().renderInline(title)}</summary>\n"
    return head if text is None else f"{head}\n{space}{text.strip()}\n\n{space}</details>\n"


class Pages:
    "The files that sphinx makes pages of. Chapters have the order and the names of the tables in the index; those that are in no table come last."

    def __init__(self, folder):  # where to write the files
        self.folder, self.more = folder, []  # more: what is no chapter, but a chapter links to it
        index = nbformat.read(NBS / "index.ipynb", 4)
        rows = [row for cell in index.cells if cell.cell_type == "markdown" for row in re.findall(r"^\|[^|]*?\[(.+?)\]\(([^()/]+)\.ipynb\)", cell.source, re.M)]
        self.titles = {name: title for title, name in rows}
        self.chapters = [*self.titles, *sorted(path.stem for path in NBS.glob("*.ipynb") if path.stem not in {"index", *self.titles})]
        for name in self.chapters: self.notebook(NBS / f"{name}.ipynb")
        self.notebook(NBS / "index.ipynb", ending=self.contents)

    def notebook(self, path, ending=None):
        "Write the page of a notebook, and below it what `ending()` says."
        notebook, page = readers_copy(nbformat.read(path, 4)), self.page(path)
        page.parent.mkdir(parents=True, exist_ok=True)
        cells = [code_cell(cell) if cell.cell_type == "code" else cell | dict(source=self.markdown(cell.source, path)) for cell in notebook.cells]
        if path.stem in self.titles: cells[0]["source"] = re.sub(r"\A# .*", lambda _: f"# {self.titles[path.stem]}", cells[0]["source"])
        if ending: cells.append(nbformat.v4.new_markdown_cell(ending(), id="ending"))
        nbformat.write(nbformat.from_dict(notebook | dict(cells=[cell for cell in cells if cell])), page)

    def markdown(self, source, path):
        "Markdown of the file `path` as it stands in its page."
        page = self.page(path)

        def link(match):
            label, target, anchor = match.groups()
            there = (path.parent / target).resolve()
            if ":" in target or not there.exists(): return match[0]
            if there.is_dir(): return label
            return f"[{label}]({os.path.relpath(self.with_page(there), page.parent)}{anchor})"

        return FOLDED.sub(unfolded, LINK.sub(link, source))

    def page(self, path):
        "Where the page of a file is written; nbs/ is the top of the site."
        return self.folder / path.relative_to(NBS if path.is_relative_to(NBS) else ROOT)

    def with_page(self, path):
        "The same, and it is written by now, or will be."
        page = self.page(path)
        if path.parent == NBS or path in self.more: return page
        self.more.append(path)
        page.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb": self.notebook(path)
        elif path.suffix == ".md": page.write_text(self.markdown(path.read_text(encoding="utf-8"), path), encoding="utf-8")
        else: shutil.copy(path, page)
        return page

    def contents(self):
        "The contents of the site, for the column on the left."
        more = [self.page(path).relative_to(self.folder).with_suffix("") for path in self.more if path.suffix in (".ipynb", ".md")]
        return "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n" + "\n".join(map(str, names)) + "\n```"
                           for caption, names in (("The course", self.chapters), ("Beside it", more)) if names)


def fetch_mathjax():
    "Fetch MathJax, where it is not there yet; a sentence where that cannot be done."
    if MATHJAX.exists(): return
    missing = "npm is not installed"
    if shutil.which("npm"):
        with TemporaryDirectory() as work:
            done = subprocess.run(["npm", "pack", MATHJAX_PACKAGE, "--fetch-retries=0", "--pack-destination", work], capture_output=True, text=True)
            missing = f"npm could not fetch {MATHJAX_PACKAGE}"
            for archive in Path(work).glob("*.tgz") if done.returncode == 0 else ():
                MATHJAX.parent.mkdir(parents=True, exist_ok=True)
                with tarfile.open(archive) as files: MATHJAX.write_bytes(files.extractfile(f"package/es5/{MATHJAX.name}").read())
                return
    print(f"{missing}, so formulas stay TeX source; run this again with npm and a network", file=sys.stderr)


def build(site):
    "Write the site; how it went, 0 for well."
    from sphinx.cmd.build import main
    fetch_mathjax()
    with TemporaryDirectory() as work:
        pages = Path(work, "pages")
        Pages(pages)
        failed = main(["-q", "-W", "--keep-going", "-c", str(COURSE), str(pages), f"{work}/html"])
        if not failed: shutil.copytree(Path(work, "html"), site, ignore=shutil.ignore_patterns(".*", "_sources"), dirs_exist_ok=True)
        return failed


if __name__ == "__main__":
    failed = build(Path(sys.argv[1]))
    if not failed: print(f"Open {sys.argv[1]}/index.html in a browser")
    sys.exit(failed)
