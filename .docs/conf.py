"""Settings of the API reference, which Sphinx makes of the docstrings."""

project = "jbag"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "none"
napoleon_attr_annotations = False
napoleon_use_ivar = True
exclude_patterns = ["_build"]
