"Slides: the pages' figures as they are now, in decks that nbconvert turns into reveal.js"
import re
import sys

import pytest

from . import slides
from .project import cells, run


def test_there_is_a_deck_for_each_part(): assert {deck.stem for deck in slides.DECKS} == {"slides_theory", "slides_model", "slides_evidence", "slides_control"}


def test_decks_show_the_figures_of_the_pages(): assert not slides.stale(), "run `python -m tests.slides`"


@pytest.mark.parametrize("deck", slides.DECKS, ids=lambda d: d.stem)
def test_deck_becomes_slides(deck, tmp_path):
    run(sys.executable, "-m", "nbconvert", "--to", "slides", "--no-input", deck, "--output-dir", tmp_path, cwd=tmp_path)
    html, = tmp_path.glob("*.html")
    text, page = html.read_text(encoding="utf-8"), cells(deck)
    shown = [c for c in page if c["cell_type"] == "code"]
    heads = [c for c in page if c["cell_type"] == "markdown" and c["source"].startswith("#")]
    assert len(heads) >= 9 and all(c["metadata"]["slideshow"]["slide_type"] == "slide" for c in heads)
    assert text.count("<section>") >= len(heads) and "reveal" in text
    assert len(re.findall(r"<img [^>]*src=\"data:image/png", text)) == len(shown) == len(heads) - 2, "each slide but the first and the last has one figure"
    assert "figure(" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.S), "no code on slides"
    assert "revealjs" in page[0]["source"] and page[0]["cell_type"] == "raw", "and Quarto makes slides of it as well"
