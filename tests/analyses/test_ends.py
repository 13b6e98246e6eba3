"""What becomes of harmful answers: the page's table is that of the committed rows."""

from itertools import product

import ends
from pages import text_of

import harmcircuits as hc


def test_the_page_has_the_table_of_the_rows():
    page = text_of("search_bench.md")
    rows = hc.Rows.read(ends.ROWS)
    for refuse, fresh in product((True, False), repeat=2):
        for line in ends.table(rows, refuse=refuse, fresh=fresh).itertuples(index=False):
            engine, aim, said, _, harmful, broken, nats, seconds = line
            cells = (engine, aim, said, harmful, broken, nats, seconds)
            assert f"| {' | '.join(cells)} |" in page
