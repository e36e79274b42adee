"""HTML pages from Jinja templates: one environment for all of them."""

from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Renders a template file; it may include the parts of pages in this folder (head.html, frames.html, clip.html).

    Every value is escaped; a value that the template uses and `values` does not contain is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**values)
