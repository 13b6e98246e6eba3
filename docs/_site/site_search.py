"""The site's search leaves out the logs: they hold results of earlier searches."""

from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Exclude the pages of `log/`, by the metadata that the theme's search reads."""
    if page.file.src_uri.startswith("log/"):
        page.meta["search"] = {"exclude": True}
    return markdown
