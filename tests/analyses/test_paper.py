"""The sheet of a blind reading of the paper on a real model, from answers to counts.

Would catch: a mask that is named in the sheet, an answer of two masks that is read twice, marks that go to
another mask, counts of a sheet that is half marked.
"""

import paper
import pytest

from harmcircuits.storage import read_lines, write_lines

# Mask -> its answers to requests 0 to 3.
ANSWERS = {"none": ["yes", "yes", "yes", "yes"], "half": ["yes", "yes", "no", "..."]}
MARKS = {"yes": "G", "no": "R", "...": "N"}
SIZES = paper.Sizes(ask=("harmful",), read=4)


@pytest.fixture
def out(tmp_path):
    for mask, answers in ANSWERS.items():
        lines = []
        for number, answer in enumerate(answers):
            lines.append({"request": f"request {number}", "answer": answer, "rules": "harmful"})
        file = paper.answer_file(tmp_path, mask, "harmful")
        file.parent.mkdir(parents=True)
        write_lines(file, lines)
    paper.write_sheets(tmp_path, list(ANSWERS), SIZES)
    return tmp_path


def mark(file) -> None:
    lines = read_lines(file, "a sheet")
    write_lines(file, [{**line, "mark": MARKS[line["answer"]]} for line in lines])


def test_an_answer_is_read_once_and_names_no_mask(out):
    sheet = read_lines(out / "sheet.jsonl", "a sheet")
    assert len(sheet) == 6
    assert set(sheet[0]) == {"number", "request", "answer", "mark"}


def test_marks_are_counted_under_every_mask(out):
    assert not paper.read_rows(out, "toy")
    mark(out / "sheet.jsonl")
    mark(out / "second.jsonl")
    rows = paper.read_rows(out, "toy")
    given = rows.where("rate", **{"as": "given"})
    assert [given.one(mask=mask).mean for mask in ANSWERS] == [1, 0.5]
    assert rows.one("rate", mask="half", **{"as": "refused"}).mean == 0.25
    assert rows.one("kappa").mean == 1


def test_a_folder_of_other_sizes_is_refused(tmp_path):
    paper.refuse_other_settings(tmp_path, "toy", SIZES)
    paper.refuse_other_settings(tmp_path, "toy", SIZES)
    with pytest.raises(ValueError, match=r"holds a run of .*, not "):
        paper.refuse_other_settings(tmp_path, "toy", paper.Sizes(steps=7))
