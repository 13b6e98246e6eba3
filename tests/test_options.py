"""Command lines as specs of models.

Would catch: texts that are dropped without a word, a model of one's own that is taken for an organism, a wording file that
is not read, sizes that end in a traceback.
"""

from pathlib import Path

import pytest

from harmcircuits.options import no_texts, own_model, specs
from harmcircuits.organisms import FOLDER
from harmcircuits.requests import Texts
from harmcircuits.subjects import SubjectSpec

FILES = {"harmful": "a.jsonl", "benign": "b.csv"}


def test_organisms_of_every_folder():
    folders = [FOLDER, Path("other")]
    found = specs(["dpo", "base"], ["sft"], folders, "cpu", harmful="", limit=0, judge="local")
    assert found == tuple(SubjectSpec(name, folder) for folder in folders for name in ("dpo", "base"))
    assert specs([], ["sft"], [FOLDER], "cuda") == (SubjectSpec("sft", device="cuda"),)


def test_own_models_where_texts_are_given():
    found = specs(["m", "n"], ["sft"], [FOLDER], "cpu", **FILES, limit=3, judge="local", batch_size=2)
    assert found == tuple(SubjectSpec(name, texts=Texts("a.jsonl", "b.csv", limit=3), batch_size=2) for name in ("m", "n"))
    assert {spec.labels["ladder"] for spec in found} == {"own"}


def test_texts_need_a_model_and_a_model_needs_texts():
    with pytest.raises(ValueError, match="--harmful is for a model of your own; give --model"):
        specs([], ["sft"], [FOLDER], "cpu", **FILES)
    with pytest.raises(ValueError, match="--benign-heldout is for a model"):
        no_texts(harmful="", benign_heldout="b.csv")
    with pytest.raises(ValueError, match="model 'm' needs its requests; give --harmful FILE and --benign FILE"):
        specs(["m"], ["sft"], [FOLDER], "cpu", harmful="", benign="b.csv")
    no_texts(harmful="", limit=0)
    with pytest.raises(ValueError, match="--temperature is for a model of your own"):
        specs(["dpo"], ["sft"], [FOLDER], "cpu", temperature=0.7)


def test_a_wording_is_read_from_its_file(tmp_path):
    (tmp_path / "w.json").write_text('{"yes": ["Ja"], "recognition": "Darf man {request}?"}')
    spec = own_model("m", "cpu", **FILES, wording=str(tmp_path / "w.json"))
    assert spec.texts is not None
    assert (spec.texts.wording.yes, spec.texts.wording.recognition) == (("Ja",), "Darf man {request}?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "xml"}, "template='xml'; expected chat or raw"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"limit": -1}, "limit=-1"),
        ({"samples": 3}, "temperature=0.0; expected more than 0"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p=2.0"),
        ({"wording": "nowhere.json"}, r"nowhere\.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        own_model("m", "cpu", **FILES, **options)
