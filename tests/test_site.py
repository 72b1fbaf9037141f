"The course as web pages and as the reader's copies: everything is there, nothing is fetched, no solution lies open."
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "course"))
from exercises import exercises, readers_copy, write_copies  # noqa: E402

NBS = ROOT / "nbs"
CHAPTERS = sorted(path.stem for path in NBS.glob("*.ipynb") if path.stem != "index")
MATHJAX = ROOT / "build" / "vendor" / "tex-svg-full.js"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}  # what a browser fetches by itself
PAST_THE_SITE = re.compile(r"\s*(https?:)?//")


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built as `make site` does."
    missing = [name for name in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton") if not importlib.util.find_spec(name)]
    if missing and not os.environ.get("CI"): pytest.skip(f"NO {', '.join(missing).upper()}, THE SITE IS NOT TESTED: pip install -e '.[site]'")
    site = tmp_path_factory.mktemp("out") / "site"
    done = subprocess.run([sys.executable, ROOT / "course" / "pages.py", site], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert f"{site}/index.html" in done.stdout
    return site


@pytest.fixture(scope="module")
def pages(site):
    "Name -> page, parsed."
    from bs4 import BeautifulSoup
    found = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {str(path.relative_to(site).with_suffix("")): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in found}


def test_next_leads_through_the_chapters_as_the_index_lists_them_and_previous_back(pages):
    index = markdown(nbformat.read(NBS / "index.ipynb", 4))
    order = ["index", *(name for source in index for name in re.findall(r"^\|[^|]*\]\((\d\d_\w+)\.ipynb\)", source, re.M))]
    assert sorted(order[1:]) == CHAPTERS and set(order) <= set(pages)
    for name, following in zip(order, order[1:]):
        assert pages[name].select_one("a.right-next")["href"] == f"{following}.html"
        assert pages[following].select_one("a.left-prev")["href"] == f"{name}.html"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_page_has_what_its_chapter_has(pages, name):
    notebook, page = readers_copy(nbformat.read(NBS / f"{name}.ipynb", 4)), pages[name]
    article = page.select_one("article")
    assert any(re.match("about .* min to read", em.get_text()) for em in article.select("em")), "how long it takes to read"
    assert len(article.select("details")) == len(article.select("details > summary")) == sum(source.count("<details") for source in markdown(notebook))
    drawn = [output.metadata["image/png"]["alt"] for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert drawn == [img["alt"] for img in article.select("img.figure")]


def test_every_picture_says_what_it_shows(pages):
    pictures = [(name, img) for name, page in pages.items() for img in page.select("img")]
    assert len(pictures) > 50
    assert not [(name, str(img)[:200]) for name, img in pictures if not img.get("alt", "").strip()]


def test_code_is_shown_without_directives_and_exercises_without_solutions(pages):
    codes = [(name, code.get_text()) for name, page in pages.items() for code in page.select("pre")]
    assert len(codes) > 500
    assert not [found for found in codes if re.search(r"^\s*#\|", found[1], re.M) or "BEGIN SOLUTION" in found[1]]
    todo = {name: len(list(exercises(nbformat.read(NBS / f"{name}.ipynb", 4).cells))) for name in CHAPTERS}
    assert sum(todo.values())
    for name, n in todo.items():
        assert len([code for page, code in codes if page == name and 'raise NotImplementedError("your turn")' in code]) == n
        folded = [details for details in pages[name].select("details") if details.summary.get_text() == "Solution" and details.select("pre")]
        assert len(folded) >= n


def test_nothing_is_loaded_from_elsewhere_and_links_lead_somewhere(site, pages):
    for name, page in pages.items():
        here = (site / name).parent
        loaded = [tag[key] for kind, key in LOADED.items() for tag in page.select(f"{kind}[{key}]")]
        assert not [url for url in loaded if PAST_THE_SITE.match(url)], name
        local = loaded + [a["href"] for a in page.select("a[href]")]
        files = {re.split("[?#]", url)[0] for url in local if url and not re.match(r"[a-z]+:|#", url)}
        assert not [url for url in files if not (here / url).exists()], name
    styles = [(path, url) for path in site.rglob("*.css") for url in re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", path.read_text(encoding="utf-8"))]
    assert styles and not [found for found in styles if PAST_THE_SITE.match(found[1])]


def test_every_chapter_can_be_searched(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{name}"' in index for name in CHAPTERS)


def is_there(url):
    "A file of the site. A request for it may fail without harm: the next page came first, or an older theme's preloading of fonts, which needs a server."
    return url.startswith("file:") and Path(unquote(urlsplit(url).path)).is_file()


def test_in_a_browser_the_pages_fit_a_phone_and_nothing_leaves_the_machine(browser, site, pages):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.set_default_timeout(180_000)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: is_there(request.url) or faults.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    for name in pages:
        page.goto((site / f"{name}.html").as_uri())
        if MATHJAX.exists(): page.wait_for_function("[...document.querySelectorAll('.math')].every(math => math.querySelector('mjx-container svg'))")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than a phone"
    page.goto((site / "search.html").as_uri() + "?q=attention")
    page.wait_for_selector("#search-results li a[href^='02_attention.html']")
    assert not faults and not [url for url in asked if not re.match("file:|data:", url)]
    page.close()
    if not MATHJAX.exists(): pytest.skip("NO MATHJAX, THE FORMULAS ARE NOT TESTED: make site says what is missing")


def test_the_readers_copies_lead_where_the_chapters_lead_and_belong_to_the_reader(tmp_path):
    lab, place = tmp_path / "lab", ROOT / "lab"
    lab.mkdir()
    (lab / "02_attention.ipynb").write_text("mine")
    write_copies(lab)
    assert (lab / "02_attention.ipynb").read_text() == "mine"
    (lab / "02_attention.ipynb").unlink()
    write_copies(lab)
    copies = [path.relative_to(lab) for path in lab.rglob("*.ipynb")]
    assert {"index", *CHAPTERS} <= {copy.stem for copy in copies}
    targets = [Path(os.path.normpath(place / copy.parent / target)) for copy in copies for source in markdown(nbformat.read(lab / copy, 4))
               for target in re.findall(r"\]\(([^)#\s]+)", source) if ":" not in target]
    there = [lab / target.relative_to(place) if target.is_relative_to(place) else target for target in targets]
    assert len(there) > 20 and not [path for path in there if not path.exists()]
