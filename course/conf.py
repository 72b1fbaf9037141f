"How sphinx makes the site; pages.py calls it."
from configparser import ConfigParser
from pathlib import Path

from sphinx.ext.mathjax import html_visit_displaymath, html_visit_math

COURSE = Path(__file__).resolve().parent
VENDOR = COURSE.parent / "build" / "vendor"
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(COURSE.parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

project = html_title = settings["title"]
author, copyright, language = settings["author"], settings["copyright"], "en"
extensions = ["myst_nb", "sphinx_copybutton"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]

html_theme = "sphinx_book_theme"
html_theme_options = dict(home_page_in_toc=True, use_download_button=False, use_fullscreen_button=False, show_toc_level=2)
html_static_path = ["static"]
html_css_files = ["course.css"]
html_context = dict(default_mode="auto")  # light or dark, as the reader's system is
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_show_search_summary = False  # it would fetch pages, which a browser does not do for files

html_math_renderer = "mathjax" if VENDOR.exists() else "source"
if VENDOR.exists():
    html_static_path.append(str(VENDOR))
    mathjax_path, mathjax3_config = "tex-svg-full.js", dict(svg=dict(scale=0.92))  # its letters stand taller than the text's


def setup(app):
    "Formulas as TeX source, for want of MathJax."
    app.add_html_math_renderer("source", (html_visit_math, None), (html_visit_displaymath, None))
