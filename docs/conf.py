"""How Sphinx builds the site: `make docs`.

Nothing comes from a network while the site is read: formulas are text, and furo brings
its own style sheets. While it is built, links into the manuals of JAX, NumPy and optax
are made if these can be reached.
"""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_tools"))

import site_gallery
import site_links
import site_plots

project = "pytree_grads"
author = "The pytree_grads developers"
release = version = installed("pytree_grads")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_tools", "gallery/*.py", "gallery/*.ipynb"]
# Single backticks in the stories of the examples are code.
default_role = "literal"

myst_heading_anchors = 3
autosummary_generate = True
# Jacobian and jacobian are one file where names do not tell small letters from large.
autosummary_filename_map = {"pytree_grads.Jacobian": "pytree_grads.class.Jacobian"}
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

intersphinx_mapping = site_links.reachable(
    {
        "jax": "https://docs.jax.dev/en/latest/",
        "numpy": "https://numpy.org/doc/stable/",
        "optax": "https://optax.readthedocs.io/en/latest/",
    }
)

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "backreferences_dir": "made/backreferences",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "site_gallery.place",
    "minigallery_sort_order": "site_gallery.place",
    "reset_argv": "site_gallery.flags",
    "image_scrapers": ("site_gallery.picture",),
    "reset_modules": (),
    "download_all_examples": False,
    # Whole runs draw their own times, and have the machine to themselves.
    "parallel": False if site_gallery.IS_FULL else 2,
    "show_signature": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = "pytree_grads"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

site_links.copy_pages()
site_plots.draw_all()


def without_private_fields(app, what, name, obj, options, signature, returned):
    """Nobody makes such an object by its class."""
    is_private = what == "class" and (signature or "").startswith("(_")
    return ("", returned) if is_private else None


def sources_as_paragraphs(app, what, name, obj, options, lines):
    """A source of several lines is one paragraph: its indent would make it a list."""
    is_source = False
    for i, line in enumerate(lines):
        is_source = line.startswith("Source: ") or (is_source and bool(line))
        lines[i] = line.lstrip() if is_source else line


def setup(app):
    """Links that lead into the repository lead to pages of the site."""
    app.connect("source-read", site_links.to_pages)
    app.connect("autodoc-process-signature", without_private_fields)
    app.connect("autodoc-process-docstring", sources_as_paragraphs)
