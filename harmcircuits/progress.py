"""How far long work is, where it does not yet use tqdm."""

from rich.console import Console
from rich.progress import Progress


def progress_bar() -> Progress:
    """Bars on standard error."""
    return Progress(console=Console(stderr=True))
