"""The pages of the bench, of stability and of the planted organism quote their committed rows."""

import pandas
import pytest
import search_bench
import search_defaults
from pages import ROOT, text_of
from support.bench import results, tables
from support.markdown import frame_markdown

from harmcircuits.measurements import Rows


def committed(name: str) -> Rows:
    return Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")


def every_method(rows: Rows) -> pandas.DataFrame:
    return results.table(rows, search_bench.every_method())


OF_PLANTED = (tables.recovery_table, tables.reach_table, tables.relearning_table)
OF_STABILITY = (tables.overlap_table, tables.effect_table)


@pytest.mark.parametrize(
    ("page", "name", "made"),
    [
        *(("planted.md", "planted", table) for table in OF_PLANTED),
        *(("log/stability.md", "stability", table) for table in OF_STABILITY),
        ("log/search.md", "search_bench", results.case_table),
        ("log/toy_models.md", "search_bench", every_method),
    ],
)
def test_a_table_is_that_of_the_rows(page, name, made):
    assert frame_markdown(made(committed(name))) in text_of(page)


def test_times_and_settings_are_those_of_the_rows():
    times = results.times_text(committed("search_bench"))
    assert times in text_of("log/toy_models.md") and times in text_of("log/search.md")
    variants = tables.variant_table(
        search_defaults.rows, search_defaults.VARIANTS, search_defaults.SIZES
    )
    assert frame_markdown(variants) in text_of("log/search.md")
