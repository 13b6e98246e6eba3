"""How the questions about a request are put.

Would catch: a wording from a file that cannot be asked, a field that is silently left out.
"""

import pytest

from harmcircuits.behaviours.questions import QuestionTemplates


def test_questions_from_a_file(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text('{"recognition": "ok to {request} ?", "yes": ["yes", "fine"]}')
    expected = QuestionTemplates(recognition="ok to {request} ?", yes=("yes", "fine"))
    assert QuestionTemplates.from_file(file) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"recognition": "ok ?"}', r"recognition is 'ok \?'.*must hold \{request\}"),
        ('{"question": "ok ?"}', r"questions\.json has 'question'.*an object.*recognition"),
        ("hello", r"questions\.json: not JSON"),
        ('{"yes": "yes"}', r"yes in .*questions\.json is 'yes'; expected a list of texts"),
    ],
)
def test_files_that_ask_nothing_are_refused(tmp_path, text, message):
    file = tmp_path / "questions.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        QuestionTemplates.from_file(file)
    with pytest.raises(ValueError, match=r"none: no such file.*; expected questions in JSON"):
        QuestionTemplates.from_file(tmp_path / "none")
