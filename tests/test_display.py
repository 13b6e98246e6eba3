"""How values show themselves: in one short line.

Would catch: a repr that prints tensors, texts or a line a field, a list that grows with what it
holds, a suggestion that is none.
"""

import pytest
from helpers import random_batch, small_model
from support.curves import curve, outcomes_of, w50

from harmcircuits.behaviours.generation import GenerationCache
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.display import listed, nearest, plural, share
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.controls import controls
from harmcircuits.studies.run import Study
from harmcircuits.studies.settings import StudySettings

MOST = 200


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, object]:
    """Every value that a user holds in hand, by the name of its class."""
    model = small_model("sft")
    bridge = model.bridge
    scores = random_scores(bridge)
    mask = top_fraction(scores, 0.01, within="model")
    data = model.calibrations(["harmful", "benign"])
    outcomes = outcomes_of(model, ["harmful", "benign"])
    path = curve(model, [mask], outcomes)
    labels = {f"label {number}": number for number in range(40)}
    rows = Rows(Measurement.exact(f"metric_{number}", labels, number) for number in range(40))
    made = [
        model,
        data["harmful"],
        Study(model, StudySettings(), rows=rows),
        scores,
        -scores,
        mask,
        ~mask,
        overlap(mask, mask),
        rows,
        model.behaviours["harmful"].prompts("heldout"),
        random_batch(),
        model.behaviours["harmful"],
        outcomes["harmful"],
        path,
        w50(path),
        controls(model, "harmful", mask, calibrations=data, n_random=1),
        GenerationCache(tmp_path_factory.mktemp("a folder of answers"), bridge),
    ]
    return {f"{number} {type(value).__name__}": value for number, value in enumerate(made)}


KINDS = {
    "Model",
    "Calibration",
    "Study",
    "WeightScores",
    "WeightMask",
    "Overlap",
    "Rows",
    "PromptSet",
    "Batch",
    "Behaviour",
    "Outcomes",
    "Curve",
    "Estimate",
    "Controls",
    "GenerationCache",
}


def test_every_value_shows_itself_in_one_short_line(values):
    assert {name.split()[1] for name in values} == KINDS
    for name, value in values.items():
        text = repr(value)
        assert text.startswith(f"{name.split()[1]}("), "it says what it is"
        assert "\n" not in text, name
        assert len(text) <= MOST, f"{name}: {text}"
        assert "tensor(" not in text, name


def test_a_behaviour_s_requests_are_not_shown(values):
    """They may be harmful."""
    prompts = next(value for name, value in values.items() if "PromptSet" in name)
    written = " ".join(map(repr, values.values()))
    for example in prompts:
        assert example.prompt not in written
        assert example.completion not in written


# Texts


def test_long_lists_are_cut():
    assert listed([]) == ""
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, 8", "one more is written out"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
    assert listed(range(5), most=3) == "0, 1, 2 and 2 more"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.344, "34%"),
        (0.0601, "6.01%"),
        (0.006, "0.60%"),
        (0.0000123, "0.0012%"),
    ],
)
def test_shares_are_in_per_cent(part, text):
    assert share(part) == text


def test_counts_have_their_noun():
    assert plural(0, "row") == "0 rows"
    assert plural(1, "mask") == "1 mask"
    assert plural(1200, "weight") == "1,200 weights"


def test_an_unknown_name_is_met_with_the_nearest_and_all():
    known = ["harmful", "benign"]
    expected = "did you mean 'harmful'? There are harmful, benign"
    assert nearest("harm", known) == expected
    assert nearest("xyz", known) == "there are harmful, benign"
    many = [f"name {number}" for number in range(40)]
    assert nearest("zzz", many).endswith("and 28 more")
