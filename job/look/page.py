"""Writes the page: content -> HTML by the template page.html.j2, which loads nothing from elsewhere."""

import os

import jinja2

from job.look.content import Content, caption


def render(content: Content) -> bytes:
    """The page as UTF-8. Names are escaped, whatever characters they have."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["name"] = lambda text: caption(str(text))
    return environment.get_template("page.html.j2").render(vars(content)).encode("utf-8", "backslashreplace")
