"""Writes every generated block of the README and of docs/, and draws their figures.

`PYTHONPATH=analyses python docs/_site/write_pages.py` writes from the committed rows; with names, such
as `docs/planted.md`, these pages alone. A test holds every page to it.
"""

import claims_page
import compiled
import ends
import few_weights_page
import performance_page
import planted
import real_models_page
import removed_or_hidden_page
import stability
import study_page
import tyro
from blocks import ROOT, Blocks, committed, with_blocks
from pandas import DataFrame
from support.runs import Tables
from tyro.conf import Positional


def blocks_of(analysis: str, tables: Tables) -> Blocks:
    """The tables of an analysis, from its committed rows."""
    blocks = {}
    for name, table in tables.items():
        blocks[name] = lambda table=table: table(committed(analysis))
    return blocks


def search_table(name: str) -> DataFrame:
    """A table of the aims of a search; the page gives the mean that decides, without the worst."""
    return ends.TABLES[name](committed("ends")).drop(columns="worst")


COMPILED = blocks_of("compiled", compiled.TABLES)
SEARCH = ("ends", "ends, fresh ladders", "ends, never taught to refuse")
PAGES: dict[str, Blocks] = {
    "README.md": {**study_page.README, **removed_or_hidden_page.README},
    "analyses/README.md": {},  # verdicts alone, as on the others
    "docs/claims.md": claims_page.CLAIMS,
    "docs/compiled.md": {"masks": COMPILED.pop("masks")},
    "docs/few_weights.md": few_weights_page.BLOCKS,
    "docs/log/compiled.md": COMPILED,
    "docs/log/stability.md": blocks_of("stability", stability.TABLES),
    "docs/log/toy_models.md": claims_page.TOY_MODELS,
    "docs/performance.md": performance_page.BLOCKS,
    "docs/planted.md": blocks_of("planted", planted.TABLES),
    "docs/real_models.md": real_models_page.BLOCKS,
    "docs/removed_or_hidden.md": removed_or_hidden_page.BLOCKS,
    "docs/results.md": {**study_page.RESULTS, **claims_page.RESULTS},
    "docs/search_bench.md": {
        **{name: lambda name=name: search_table(name) for name in SEARCH},
        **claims_page.SEARCH,
    },
}
PICTURES = {
    **claims_page.PICTURES,
    **few_weights_page.PICTURES,
    **performance_page.PICTURES,
    **real_models_page.PICTURES,
    **removed_or_hidden_page.PICTURES,
    **study_page.PICTURES,
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
