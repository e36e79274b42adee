"""Every page has the one head, which makes it readable at the width of a phone."""

import pytest

from tests import ROOT

HEAD = ROOT / "rynnvla_jax" / "pages" / "head.html"
PARTS = {HEAD, *(HEAD.with_name(f"{name}.html") for name in ("frames", "clip", "clip_style"))}
TEMPLATES = sorted({*ROOT.glob("rynnvla_jax/**/*.html"), *ROOT.glob("data_pipelines/**/*.html")} - PARTS)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_share_one_head(template):
    text = template.read_text(encoding="utf-8")
    assert '{% include "head.html" %}' in text and "<!doctype" not in text and "viewport" not in text
    assert text.count("<main>") == text.count("</main>") == 1


def test_the_head_is_for_phones_too():
    text = HEAD.read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "img, svg, video { max-width: 100%; }" in text
    narrow = text.partition("@media (max-width: 640px) {")[2]
    assert "table { display: block; max-width: 100%; overflow-x: auto; }" in narrow
