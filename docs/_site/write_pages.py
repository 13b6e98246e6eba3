"""Writes every generated block of the README and of docs/, and draws their figures.

`PYTHONPATH=analyses python docs/_site/write_pages.py` writes from the committed rows; with names, such
as `docs/claims.md`, these pages alone. A test holds every page to it.
"""

import claims_page
import compiled
import few_weights_page
import glance_page
import ground_truth_page
import performance_page
import planted
import readme_page
import real_models_page
import removed_or_hidden_page
import search_page
import stability
import study_page
import tyro
from blocks import ROOT, Blocks, committed, with_blocks
from support.runs import Tables
from tyro.conf import Positional


def blocks_of(analysis: str, tables: Tables) -> Blocks:
    """The tables of an analysis, from its committed rows."""
    blocks = {}
    for name, table in tables.items():
        blocks[name] = lambda table=table: table(committed(analysis))
    return blocks


PAGES: dict[str, Blocks] = {
    "README.md": readme_page.BLOCKS,
    "analyses/README.md": {},  # verdicts alone, as on the others
    "docs/claims.md": claims_page.CLAIMS,
    "docs/glance.md": glance_page.BLOCKS,
    "docs/log/claims.md": claims_page.KEY_NUMBERS,
    "docs/cost.md": performance_page.COST,
    "docs/few_weights.md": few_weights_page.BLOCKS,
    "docs/ground_truth.md": ground_truth_page.BLOCKS,
    "docs/log/compiled.md": blocks_of("compiled", compiled.TABLES),
    "docs/log/planted.md": blocks_of("planted", planted.TABLES),
    "docs/log/few_weights.md": few_weights_page.LOG,
    "docs/log/performance.md": performance_page.LOG,
    "docs/log/real_models.md": real_models_page.LOG,
    "docs/log/removed_or_hidden.md": removed_or_hidden_page.LOG,
    "docs/log/search.md": search_page.BLOCKS,
    "docs/log/stability.md": blocks_of("stability", stability.TABLES),
    "docs/log/toy_models.md": {**study_page.TOY_MODELS, **claims_page.TOY_MODELS},
    "docs/real_models.md": real_models_page.BLOCKS,
    "docs/removed_or_hidden.md": removed_or_hidden_page.BLOCKS,
}
PICTURES = {
    **few_weights_page.PICTURES,
    **performance_page.PICTURES,
    **real_models_page.PICTURES,
    **removed_or_hidden_page.PICTURES,
    **readme_page.PICTURES,
}


def page_text(name: str, text: str) -> str:
    """The text of a page with all its blocks and verdicts."""
    return claims_page.with_verdicts(with_blocks(text, PAGES[name]))


def main(pages: Positional[tuple[str, ...]] = ()) -> None:
    """Write the blocks and draw the figures.

    Args:
        pages: only these, and no figure.
    """
    for name in pages or PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        path.write_text(page_text(name, text), encoding="utf-8")
    for name, draw in PICTURES.items() if not pages else ():
        draw().save(ROOT / "docs" / "figures" / name)


if __name__ == "__main__":
    tyro.cli(main)
