"""Sphinx configuration: `make docs`."""

from importlib.metadata import version as package_version

project = "Open Chameleon"
copyright = "the Open Chameleon authors"
release = package_version("open-chameleon")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Open Chameleon {release}"
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark names with single backticks
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
suppress_warnings = ["ref.python"]  # fields of the same name in several dataclasses
nitpicky = False
