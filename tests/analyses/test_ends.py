"""What becomes of harmful answers: the page's table is that of the committed rows."""

import ends
from pages import text_of

import harmcircuits as hc


def test_the_page_has_the_table_of_the_rows():
    page = text_of("search_bench.md")
    for line in ends.table(hc.Rows.read(ends.ROWS)).itertuples(index=False):
        engine, aim, said, _, broken, nats, seconds = line
        assert f"| {engine} | {aim} | {said} | {broken} | {nats} | {seconds} |" in page
