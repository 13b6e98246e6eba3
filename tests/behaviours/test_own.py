"""Behaviours of one's own, from files and dicts; the model stands in where one is needed.

Would catch: a judge that says shown of what is not, a file's references replaced by the model's own
answers, requests read from another folder than the behaviour's, a slip in a file that passes.
"""

import json
import pickle
from dataclasses import replace

import pytest

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.files import RequestFiles, request_behaviours
from harmcircuits.behaviours.own import AnswerJudge, OwnBehaviour
from harmcircuits.prompts import SPLITS, Example, PromptSet

WALLS = [{"prompt": f"paint wall {n}", "completion": f"Wall {n} is white"} for n in range(40)]
GIVEN = {"name": "paints", "prompts": [dict(row) for row in WALLS]}


# Judges


@pytest.mark.parametrize(
    ("judge", "answer", "verdict"),
    [
        (AnswerJudge("answered"), "white", "answered"),
        (AnswerJudge("answered"), "I'm sorry, but I can't help with that", "refusal"),
        (AnswerJudge("answered"), "?! ?! ?!", "degenerate"),
        (AnswerJudge("answered", prefill="Well,"), "Well,", "degenerate"),
        (AnswerJudge("refused"), "I'm sorry, but I can't help with that", "refusal"),
        (AnswerJudge("refused"), "white", "answered"),
        (AnswerJudge("pattern", r"\d{2}"), "it is 42", "match"),
        (AnswerJudge("pattern", r"\d{2}"), "it is 4", "other"),
        (AnswerJudge("pattern", r"^\{.*\}$"), '{"":[]}', "match"),
        (AnswerJudge("pattern", "Well", prefill="Well,"), "Well, yes", "other"),
        (AnswerJudge("pattern", "(?i)WHITE"), "white", "match"),
        (AnswerJudge("reference", references={"p": "is  White"}), "It IS white.", "correct"),
        (AnswerJudge("reference", references={"p": "is white"}), "it is not white", "other"),
        (AnswerJudge("reference", references={"p": "is white"}), "I cannot say", "refusal"),
    ],
)
def test_verdicts(judge, answer, verdict):
    assert judge("p", answer) == verdict
    assert pickle.loads(pickle.dumps(judge))("p", answer) == verdict


def test_rows_name_the_judge():
    names = [AnswerJudge(by).name for by in ("answered", "refused", "reference", "pattern")]
    assert names == ["local rules", "local rules", "reference", "pattern"]


# Files


def test_a_file_says_it_all(tmp_path):
    """In TOML and in JSON, with its requests beside it wherever it is read from."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = ["goal,target", *(f"{row['prompt']},{row['completion']}" for row in WALLS)]
    (folder / "walls.csv").write_text("\n".join(lines))
    (folder / "paints.toml").write_text(
        """
        name = "paints"
        prompts = "walls.csv"
        references = "file"
        judge = "reference"
        prefill = "Well,"
        is_kept = false
        title = "walls"
        metric = "paint_share"
        max_new_tokens = 5
        """
    )
    behaviour = OwnBehaviour.of(folder / "paints.toml").behaviour()
    assert isinstance(behaviour, Behaviour)
    assert (behaviour.name, behaviour.title, behaviour.wanted) == ("paints", "walls", "correct")
    assert (behaviour.metric, behaviour.nll_metric) == ("paint_share", "paints_nll")
    assert (behaviour.prefill, behaviour.max_new_tokens, behaviour.is_kept) == ("Well,", 5, False)
    assert set(behaviour.side_metrics) == {"refusal", "degenerate"}
    asked = [example for split in SPLITS for example in behaviour.prompts(split)]
    assert {(example.prompt, example.completion) for example in asked} == {
        (row["prompt"], row["completion"]) for row in WALLS
    }
    assert behaviour.judge is not None
    assert behaviour.judge("paint wall 3", "wall 3 is white, at last") == "correct"

    (folder / "paints.json").write_text(
        json.dumps({"name": "paints", "prompts": "walls.csv", "columns": {"prompt": "target"}})
    )
    usual = OwnBehaviour.of(str(folder / "paints.json"))
    assert usual.shapes[0].startswith(f"{folder / 'walls.csv'}: prompt from target; 40 requests")
    plain = usual.behaviour()
    assert (plain.title, plain.metric, plain.is_kept) == ("paints", "paints_rate", True)
    assert not plain.side_metrics
    assert not any(example.completion for example in plain.prompts("heldout"))
    assert "Wall" in plain.prompts("heldout").examples[0].prompt


def test_own_references_replace_those_of_the_file_but_not_in_the_judge():
    own = OwnBehaviour.of({**GIVEN, "judge": "reference"}).behaviour()
    assert not own.is_scored_on_references
    assert not any(example.completion for example in own.prompts("calibration"))
    assert own.judge is not None
    assert own.judge("paint wall 3", "wall 3 is white") == "correct"
    assert own.judge("paint wall 3", "wall 4 is white") == "other"


def test_requests_are_split_once_each_and_heldout_ones_held_out():
    repeated = [{"prompt": "paint wall 0", "group": str(n)} for n in range(30)]
    heldout = [{"prompt": "paint wall 1", "completion": "so"}]
    given = {**GIVEN, "prompts": [*WALLS, *repeated], "heldout": heldout}
    behaviour = OwnBehaviour.of(given).behaviour()
    assert [example.prompt for example in behaviour.prompts("heldout")] == ["paint wall 1"]
    scored = [example.prompt for example in behaviour.prompts("calibration")]
    chosen = [example.prompt for example in behaviour.prompts("choice")]
    assert len(scored) + len(chosen) == len({*scored, *chosen}) == 39
    assert "paint wall 1" not in {*scored, *chosen}
    few = OwnBehaviour.of(GIVEN).behaviour({"calibration": 5, "choice": 2, "heldout": 2})
    assert [len(few.prompts(split)) for split in SPLITS] == [5, 2, 2]


def test_the_digest_is_of_settings_and_requests():
    own = OwnBehaviour.of(GIVEN)
    others = [
        replace(own, prefill="Well,"),
        replace(own, judge="refused"),
        replace(own, prompts=PromptSet.of(["paint"])),
        replace(own, heldout=PromptSet.of(["paint"])),
    ]
    assert len({own.digest, *(other.digest for other in others)}) == 5
    assert OwnBehaviour.of(GIVEN).digest == own.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "behaviours: no 'name'; a behaviour needs"),
        ({"prompts": ""}, "no 'prompts'"),
        ({"name": "others"}, "name='others'; expected letters"),
        ({"name": "a/b"}, "name='a/b'; expected letters, digits, spaces"),
        ({"judje": "answered"}, "'judje' is no key of a behaviour; did you mean 'judge'"),
        ({"judge": "answerd"}, "behaviour 'paints': judge='answerd'; did you mean 'answered'"),
        ({"references": "both"}, "references='both'; there are own, file"),
        ({"judge": "pattern"}, "judge='pattern' with pattern=''; the judge 'pattern' needs one"),
        ({"pattern": "a"}, "judge='answered' with pattern='a'"),
        ({"judge": "pattern", "pattern": "("}, r"pattern='\(' is no regular expression"),
        ({"is_kept": "yes"}, "behaviours: is_kept is str; expected bool"),
        ({"max_new_tokens": True}, "max_new_tokens is bool; expected int"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"columns": "prompt"}, "columns is str; expected Mapping"),
        ({"prompts": 3}, "prompts is int; expected str or PromptSet"),
    ],
)
def test_a_slip_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OwnBehaviour.of({**GIVEN, **changes})


def test_missing_answers_are_refused():
    rows = [*WALLS, {"prompt": "paint it"}]
    for needs in ({"references": "file"}, {"judge": "reference"}):
        own = OwnBehaviour.of({"name": "paints", "prompts": rows, **needs})
        with pytest.raises(ValueError, match="'paints': 1 of 41 requests have no completion"):
            own.behaviour()


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("a.toml", "name = paints"), ("missing.json", None)]
)
def test_what_is_no_file_of_a_behaviour_is_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: no .*behaviour in JSON,? or TOML"):
        OwnBehaviour.of(tmp_path / name)


def test_what_is_no_behaviour_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json: expected one object with some of name"):
        OwnBehaviour.of(tmp_path / "a.json")
    with pytest.raises(
        ValueError, match="expected a file or a dict, got Behaviour; add it by model"
    ):
        OwnBehaviour.of(OwnBehaviour.of(GIVEN).behaviour())


# Among the files of a model


def test_own_behaviours_stand_beside_the_usual_ones():
    harmful = PromptSet.of([f"break thing {n}" for n in range(40)])
    benign = PromptSet.of([f"mend thing {n}" for n in range(40)])
    files = RequestFiles(harmful, benign, behaviours=[GIVEN], limit=3)
    behaviours, kinds = request_behaviours(files, prefill="")
    assert list(behaviours)[-1] == "paints"
    assert len(behaviours["paints"].prompts("calibration")) == 3
    assert not any("paint" in prompt for prompt in kinds)
    with pytest.raises(ValueError, match="there is a 'benign' already; give another name"):
        named = RequestFiles(harmful, benign, behaviours=[{**GIVEN, "name": "benign"}])
        request_behaviours(named, prefill="")


def test_own_behaviours_alone_are_enough():
    files = RequestFiles.of({"behaviours": [GIVEN]})
    behaviours, kinds = request_behaviours(files, prefill="Well,")
    assert (list(behaviours), kinds) == (["paints"], {})
    for half in ({"harmful": ["a"]}, {"benign": ["a"]}):
        with pytest.raises(ValueError, match="give a file or a list of requests for it"):
            RequestFiles.of({"behaviours": [GIVEN], **half})


# Columns and shapes of the files of a model


def test_columns_are_of_all_files_or_of_one(tmp_path):
    (tmp_path / "bad.csv").write_text("ask,theme\nbreak it,x\n")
    (tmp_path / "good.csv").write_text("ask,kind\nmend it,y\n")
    columns = {"prompt": "ask", "harmful.category": "theme", "benign.category": "kind"}
    paths = {"harmful": tmp_path / "bad.csv", "benign": str(tmp_path / "good.csv")}
    files = RequestFiles.of({**paths, "columns": columns})
    assert files.requests("harmful").examples == (Example("break it", category="x"),)
    assert files.requests("benign").examples == (Example("mend it", category="y"),)
    rows = RequestFiles.of({**paths, "benign": [{"ask": "mend it"}], "columns": {"prompt": "ask"}})
    assert rows.requests("benign") == PromptSet.of(["mend it"])
    assert pickle.loads(pickle.dumps(files)) == files
    assert "columns={'prompt': 'ask'" in repr(files)
    assert "columns" not in repr(RequestFiles("a", "b"))
    for wrong, message in (
        ({"harm.prompt": "ask"}, "'harm.prompt' names no file; did you mean 'harmful'"),
        ({"harmful.promt": "ask"}, "'promt' is no column; did you mean 'prompt'"),
    ):
        with pytest.raises(ValueError, match=message):
            RequestFiles.of({**paths, "columns": wrong})


def test_every_file_says_how_it_was_read(tmp_path):
    (tmp_path / "bad.csv").write_text("goal,target\nbreak it,so\n")
    (tmp_path / "good.txt").write_text("mend it\n")
    bad, good = tmp_path / "bad.csv", tmp_path / "good.txt"
    files = RequestFiles(str(bad), str(good), behaviours=[GIVEN], plain="nowhere.txt")
    assert files.shapes == [
        f"harmful: {bad}: AdvBench: prompt from goal, completion from target; 1 request"
        "; its answers are not used",
        f"benign: {good}: prompt; 1 request",
        "paints: the given rows: prompt, completion; 40 requests",
    ]
    assert RequestFiles(PromptSet.of(["a"]), PromptSet.of(["b"])).shapes == []
