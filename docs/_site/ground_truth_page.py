"""The two tables of "Ground truth": masks of compiled models, and of the planted one."""

import compiled
import planted
from blocks import Blocks, committed
from pandas import DataFrame

# Method of the rows -> its name on the page; the log has all methods.
MASKS = {
    "harm's alone": "the true weights",
    "search": "search",
    "published difference": "paper's set difference",
    "SNIP": "SNIP",
    "Wanda": "Wanda",
}
COMPILED = {
    "ends harm": "no harm",
    "and nothing else": "no harm, all else kept",
    "recall": "recall, tidy",
    "precision": "precision, tidy",
}
REACHES = {"all": "among all weights", "outside S": "outside S", "inside S": "within S"}
PLANTED = {
    "weights": "weights",
    "in S": "in S",
    "harm left": "harm left",
    "benign loss": "rise of benign loss",
    "kept rates fall by": "largest fall of another rate",
}


def compiled_table() -> DataFrame:
    """What each mask of the true size removes, and how many of its weights are true."""
    table = compiled.TABLES["masks"](committed("compiled")).set_index("mask")
    chosen = table.loc[list(MASKS), list(COMPILED)].rename(index=MASKS, columns=COMPILED)
    return chosen.map(shortened).reset_index()


def shortened(text: str) -> str:
    """A range with a dash; one number where both ends are the same."""
    low, _, high = text.partition(" to ")
    return low if high in ("", low) else f"{low}–{high}"


def planted_table() -> DataFrame:
    """What the smallest masks leave, by what the search could choose from; and S itself."""
    lines = []
    for line in planted.reach_table(committed("planted")).to_dict("records"):
        names = {"S": "S itself", "search, 0.1%": f"mask {REACHES[line['in reach']]}"}
        name = names.get(line["removed"])
        if name:
            cells = {title: line[column] for column, title in PLANTED.items()}
            lines.append({"removed": name, **cells})
    return DataFrame(lines)


BLOCKS: Blocks = {"compiled": compiled_table, "planted": planted_table}
