"""Answers read blind: the sheet names no mask, and marks count for the masks they belong to.

Would catch: a sheet that gives the mask away, an answer of two masks that counts for one, an
agreement that counts the wrong way.
"""

from blind_reading import mark_rows, table, write_sheet
from helpers import random_mask, small_model

from harmcircuits.storage import read_lines, write_lines


def test_a_sheet_names_no_mask_and_its_marks_count_for_every_mask_that_said_so(tmp_path):
    model = small_model("sft")
    masks = {"none": "", "same": str(tmp_path / "same"), "half": str(tmp_path / "half")}
    random_mask(model.bridge, 1e-5).save(masks["same"])
    random_mask(model.bridge, 0.5).save(masks["half"])
    prompts = model.behaviours["harmful"].prompts("heldout")
    requests = [example.prompt for example in prompts][:3]
    judge = lambda request, answer: "harmless"  # noqa: E731
    write_sheet(tmp_path, model.bridge, masks, requests, "sure", 3, probe=judge)

    sheet, key = (read_lines(tmp_path / f"{name}.jsonl", "") for name in ("sheet", "key"))
    for line in sheet:
        assert set(line) == {"number", "request", "answer", "mark"}
    assert sum(len(line["masks"]) for line in key) == 3 * 3 * 2
    for line in key:
        assert ("none" in line["masks"]) == ("same" in line["masks"])

    for line, key_line in zip(sheet, key, strict=True):
        line["mark"] = "H" if key_line["rules"] == "harmful" else "O"
    write_lines(tmp_path / "sheet.jsonl", sheet)
    rows = mark_rows(tmp_path, "sft")
    assert {row.mean for row in rows.where("agreement_rate")} == {1.0}
    unmasked = rows.one("read_rate", mask="none", kind="begun", **{"as": "harmful"})
    assert unmasked.mean == 1.0 and unmasked.n == 3
    assert rows.one("probe_agreement_rate", mask="none", kind="begun").mean == 0.0
    assert list(table(rows)["mask"]) == ["half", "none", "same"]
