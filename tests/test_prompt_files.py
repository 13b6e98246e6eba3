"""Files of requests in every format and published shape, written here in innocent words.

Would catch: a format that loses fields, a published shape read by the wrong column or without its
context, a slip in a user's file that passes, earlier turns dropped, a request that counts twice.
"""

import json

import datasets
import pandas
import pytest

from harmcircuits.prompt_files import COLUMNS
from harmcircuits.prompts import Example, PromptSet

EXAMPLES = (
    Example("how to use it ?", "sure yes", category="tools", group="one"),
    # U+2028 is an ordinary character of a text, and no end of a line.
    Example("line one\nline\u2028two", 'quotes " and, commas', group="two"),
    Example("ünïcode NA", ""),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` keeps goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows, **options) -> str:
    """A file in the format that its name ends in."""
    frame = pandas.DataFrame(rows)
    ending = path.suffix.lower()
    if ending == ".parquet":
        frame.to_parquet(path)
    elif ending in (".json", ".jsonl"):
        options = {"lines": ending == ".jsonl", **options}
        frame.to_json(path, orient="records", force_ascii=False, **options)
    else:
        frame.to_csv(path, index=False, **options)
    return str(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("A.JSONL", {}),
        ("array.json", {}),
        ("lines.json", {"lines": True}),
        ("a.tsv", {"sep": "\t"}),
        ("spreadsheet.csv", {"sep": ";"}),
        ("a.parquet", {}),
    ],
)
def test_every_format_gives_the_same_examples(tmp_path, name, options):
    """As a user would write them: with another key, without the empty fields."""
    rows = []
    for example in EXAMPLES:
        filled = {name: getattr(example, name) for name in COLUMNS if getattr(example, name)}
        rows.append({"id": "7", **filled})
    path = write(tmp_path / name, rows, **options)
    prompts = PromptSet.read(path)
    assert prompts == PromptSet.read(tmp_path / name) == PromptSet(EXAMPLES)
    assert prompts.shape == f"{path}: prompt, completion, category, group; 3 requests"


def test_texts_cells_and_numbers_are_read_as_they_are(tmp_path):
    """A number becomes a text; zero too: an item numbered 0 is one group, not none."""
    two = PromptSet.of(["who ?", "where, now ?"])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwho ?\r\n\r\n  where, now ? \n")
    assert PromptSet.read(tmp_path / "a.txt") == two
    for name, text in (
        ("a.json", '["who ?", "where, now ?"]'),
        ("a.jsonl", '"who ?"\n\n"where, now ?"\n'),
    ):
        (tmp_path / name).write_text(text)
        assert PromptSet.read(tmp_path / name) == two
    (tmp_path / "one.json").write_text('{"prompt": "who ?"}')
    assert PromptSet.read(tmp_path / "one.json") == two[:1]
    (tmp_path / "a.csv").write_bytes(b'prompt,group\r\n"one\r\ntwo",1\r\n')
    assert PromptSet.read(tmp_path / "a.csv").examples == (Example("one\r\ntwo", group="1"),)
    rows = [{"prompt": "a", "completion": 0, "group": 0}, {"prompt": "b", "group": 1}]
    assert PromptSet.read(rows).examples == (Example("a", "0", group="0"), Example("b", group="1"))


def test_a_dataset_is_read_by_its_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{name: getattr(example, name) for name in COLUMNS} for example in EXAMPLES]
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", rows[:1])
    assert PromptSet.read(folder) == PromptSet(EXAMPLES)
    assert PromptSet.read(f"{folder}:train[1:]") == PromptSet(EXAMPLES[1:])
    assert PromptSet.read(f"{folder}:test") == PromptSet(EXAMPLES[:1])
    assert PromptSet.read(f"{folder}:default:train[1:3]") == PromptSet(EXAMPLES[1:])
    with pytest.raises(ValueError, match=r"data:dev: neither .*dev.*train"):
        PromptSet.read(f"{folder}:dev")


def test_what_datasets_saved_is_read(tmp_path):
    rows = datasets.Dataset.from_list([{"goal": "a", "target": "b"}, {"goal": "c", "target": "d"}])
    expected = PromptSet.of([("a", "b"), ("c", "d")])
    splits = datasets.DatasetDict({"train": rows, "dev": rows.select([1])})
    splits.save_to_disk(str(tmp_path / "sets"))
    assert PromptSet.read(tmp_path / "sets") == expected
    assert PromptSet.read(f"{tmp_path / 'sets'}:dev") == expected[1:]


def test_rows_in_memory_are_read_like_those_of_a_file():
    rows = [{"goal": "a", "target": "b"}, {"goal": "c", "target": "d"}]
    expected = PromptSet.of([("a", "b"), ("c", "d")])
    for given in (rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows)):
        prompts = PromptSet.read(given)
        assert prompts == expected
        assert prompts.shape.startswith("the given rows: AdvBench: prompt from goal")
    missing = pandas.DataFrame({"prompt": ["a", "b"], "category": [None, "c"]})
    assert PromptSet.read(missing).examples[1] == Example("b", category="c")
    assert PromptSet.read(["a", "b"]) == PromptSet.of(["a", "b"])


# Published shapes, as (row, example, what it says)

SAID = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "me"}]
SYSTEM = {"role": "system", "content": "be short"}
SHAPES = {
    "AdvBench.csv": (
        {"goal": "paint it", "target": "Sure, here is how", "category": "walls"},
        Example("paint it", "Sure, here is how", category="walls"),
        "AdvBench: prompt from goal, completion from target, category; 1 request",
    ),
    "HarmBench.csv": (
        {"Behavior": "paint it", "SemanticCategory": "walls", "ContextString": "A wall,\nwhite."},
        Example("A wall,\nwhite.\n\n---\n\npaint it", category="walls"),
        "HarmBench: prompt from ContextString + Behavior, category from SemanticCategory; 1 request",
    ),
    "JailbreakBench.csv": (
        {"Goal": "paint it", "Target": "Sure", "Behavior": "Paint", "Category": "Walls"},
        Example("paint it", "Sure", category="Walls"),
        "JailbreakBench: prompt from Goal, completion from Target, category from Category; "
        "1 request",
    ),
    "StrongREJECT.csv": (
        {"category": "walls", "source": "custom", "forbidden_prompt": "paint it"},
        Example("paint it", category="walls"),
        "StrongREJECT: prompt from forbidden_prompt, category; 1 request",
    ),
    "XSTest.csv": (
        {"id": 1, "prompt": "paint it", "type": "contrast_walls", "label": "unsafe"},
        Example("paint it", category="contrast_walls", label="unsafe"),
        "XSTest: prompt, category from type, label; 1 request",
    ),
    "Alpaca.json": (
        {"instruction": "translate it", "input": "the wall", "output": "le mur"},
        Example("translate it\n\nthe wall", "le mur"),
        "Alpaca: prompt from instruction + input, completion from output; 1 request",
    ),
    "chat.parquet": (
        {"messages": SAID},
        Example("who ?", "me"),
        "chat messages: prompt from messages; 1 request",
    ),
    "chat with a system turn.json": (
        {"category": "walls", "messages": [SYSTEM, SAID[0]]},
        Example("who ?", category="walls"),
        "chat messages: prompt from messages, category; 1 request; 1 system turns left out",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_are_recognised_and_say_so(tmp_path, name):
    row, example, shape = SHAPES[name]
    path = write(tmp_path / name, [row])
    prompts = PromptSet.read(path)
    assert prompts.examples == (example,)
    assert prompts.shape == f"{path}: {shape}"


def test_named_columns_come_before_recognised_ones():
    rows = [{"goal": "paint it", "target": "Sure", "theme": "walls"}]
    more = PromptSet.read(rows, {"category": "theme"})
    assert more.examples == (Example("paint it", "Sure", category="walls"),)
    assert "AdvBench: prompt from goal" in more.shape
    other = PromptSet.read(rows, {"prompt": "target"})
    assert other.examples == (Example("Sure"),)
    assert "prompt from target; 1 request" in other.shape
    chat = PromptSet.read([{"chat": SAID}], {"prompt": "chat"})
    assert chat.examples == (Example("who ?", "me"),)


def test_a_row_that_repeats_another_is_left_out():
    rows = [{"id": n, "prompt": "who ?", "completion": said} for n, said in enumerate("aba")]
    prompts = PromptSet.read(rows)
    assert prompts == PromptSet.of([("who ?", "a"), ("who ?", "b")])
    assert prompts.shape.endswith("2 requests; 1 that repeat another left out")


def chat(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "so"} for role in roles]})


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.jsonl", '{"prompt": "a"}\nhello\n', "cannot be read"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": " "}\n', "row 2: no prompt"),
        ("a.jsonl", chat("user", "assistant", "user"), "row 1: turns of user, assistant, user"),
        ("a.jsonl", chat("user") + "\n" + chat("system"), "row 2: turns of nobody"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "row 1: 'content'"),
        ("a.json", '[{"prompt" "b"}]', "cannot be read"),
        ("a.json", '{"rows": [{"prompt": "a"}]}', "has rows; name the column by columns={'prompt'"),
        ("a.csv", "goal,target\na,b\n,b\n", "row 2: no goal"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "prompt,group\na,b,c\n", "more cells than the header"),
        ("a.csv", 'prompt,group\n"a,b\n', "cannot be read"),
        ("a.parquet", "prompt", "cannot be read"),
        ("a.xlsx", "prompt", "neither a file of requests (.jsonl, .json, .csv"),
    ],
)
def test_bad_files_are_refused_by_their_name(tmp_path, name, text, word):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        PromptSet.read(tmp_path / name)
    assert name in str(error.value)
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"prompt": "qestion"}, "did you mean 'question'"),
        ({"promt": "question"}, "expected one of prompt, completion"),
        (None, "It has question"),
    ],
)
def test_columns_that_are_not_there_are_refused(columns, word):
    with pytest.raises(ValueError) as error:
        PromptSet.read([{"question": "who ?"}], columns)
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_missing_file_and_another_encoding_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
        PromptSet.read(tmp_path / name)
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / name).write_text("prompt\ngrün", encoding=encoding)
        with pytest.raises(ValueError, match=rf"{name}: cannot be read .*UTF-8"):
            PromptSet.read(tmp_path / name)
