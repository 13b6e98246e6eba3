"""The pages of docs/ run and are true: their Python, commands, files, links.

Would catch: an example that no longer works, an option or file that is gone, a link to nowhere, a
page that nothing links to. Figures are held to committed rows beside the tests of their analyses.
"""

import re
import shlex
from ast import literal_eval
from functools import cache, partial

import attacks
import emergent_misalignment
import pytest
import torch
from helpers import asked_few, random_batch, small_model
from pages import PAGES, README, ROOT, anchors, blocks, text_of

import harmcircuits as hc
from harmcircuits.batches import MIN_ANSWERS
from harmcircuits.circuits import gates
from harmcircuits.cli import parsed
from harmcircuits.organisms import world
from harmcircuits.organisms.compiled import COMPILED
from harmcircuits.organisms.shipped import FOLDER, ORGANISMS
from harmcircuits.search import benefits, circuit, descent, schedule, texts

WITH_CODE = [path for path in PAGES if blocks(path.read_text(encoding="utf-8"), "python")]
ALL = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (README, *PAGES)}


# Cached: every page leaves a model as it was.
small_models = cache(partial(small_model, every=32))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, one_step):
    """Few requests; for a model and files of the reader's own, an organism and its requests."""
    really_open = partial(hc.open_model, cache=tmp_path / "cache")

    def open_model(name, **options):
        if name in ORGANISMS:
            return small_models(name)
        if name in COMPILED:
            return really_open(name)
        options = {**options, "max_new_tokens": 9, "prefill": "sure"}
        return asked_few(really_open(str(FOLDER / "sft"), **options), first=4)

    monkeypatch.setattr(hc, "open_model", open_model)
    monkeypatch.setattr(hc, "load_model", lambda *_, **__: small_models("sft").bridge)
    monkeypatch.chdir(tmp_path)
    items = list(world.world().items.values())[::3]
    for name, verb in {"harmful": "abuse", "benign": "use", "opinions": "use"}.items():
        form = world.FORMS["answer"][0]
        requests = [form.format(verb=verb, item=item.name) for item in items]
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt", *requests]))


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_python_runs(path, stand_ins):
    space: dict = {}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        for library in ("peft", "inspect_ai"):
            if f"from {library} " in block:
                pytest.importorskip(library, reason="pip install 'harmcircuits[interop]'")
        exec(compile(block, path.name, "exec"), space)
    if "served" in space:
        tokens, served = random_batch().tokens, space["served"].api._hf
        unpruned = served(tokens).logits
        with hc.masked(space["bridge"], space["mask"]), hc.masked(space["model"], space["mask"]):
            assert torch.equal(served(tokens).logits, space["model"].bridge(tokens))
            assert not torch.equal(served(tokens).logits, unpruned)


SHOWN = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", flags=re.S | re.M)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
WITH_OUTPUT = [
    path for path in WITH_CODE if any(shown for _, shown in SHOWN.findall(path.read_text("utf-8")))
]


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_OUTPUT, ids=lambda path: path.stem)
def test_a_page_shows_what_its_code_prints(path, tmp_path, monkeypatch, capsys):
    """Of the shipped models; words exactly, figures within a tenth."""
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for code, shown in SHOWN.findall(path.read_text(encoding="utf-8")):
        if "org/model" in code or "inspect_ai" in code:
            break
        exec(compile(code, path.name, "exec"), space)
        printed = capsys.readouterr().out
        if shown:
            assert NUMBER.sub("#", printed).strip() == NUMBER.sub("#", shown).strip()
            assert figures(printed) == pytest.approx(figures(shown), rel=0.1, abs=2)


def figures(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_every_python_block_is_one_that_runs():
    """Also the indented ones, in a tab or a list."""
    for name, text in ALL.items():
        fences = re.findall(r"^\s*```\s*py\w*", text, flags=re.M)
        assert len(fences) == len(blocks(text, "python")), name


def test_commands_and_their_options_exist():
    shell = "\n".join(block for text in ALL.values() for block in blocks(text, "bash"))
    commands = re.findall(r"harmcircuits ((?:study|export) .*)", shell)
    assert len(commands) > 5
    for line in commands:
        parsed(shlex.split(line, comments=True))
    known = {"--help", *re.findall(r"--[a-z][\w-]*", text_of("commands.md"))}
    for experiment in (attacks, emergent_misalignment):
        for option in experiment.claim.options:
            known.add(f"--{option.replace('_', '-')}")
    for page in ("own_model.md", "cost.md", "judges.md", "faq.md"):
        assert set(re.findall(r"--[a-z][\w-]*", text_of(page))) <= known, page


IN_GIT = "in the git history at b6a5f48"
GONE = {
    "analyses/by_loss.py",
    "analyses/frontier.py",
    "analyses/search_bench.py",
    "analyses/search_defaults.py",
    "analyses/second_opinion.py",
    "analyses/support/bench/methods.py",
    "analyses/support/bench/rounds.py",
}


def test_scripts_and_modules_exist():
    for text in ALL.values():
        for path in re.findall(r"`((?:analyses|benchmarks|harmcircuits|tests)/[\w/.]+)`", text):
            is_gone = path in GONE and IN_GIT in text
            assert is_gone or (ROOT / path).exists(), path
        for path in re.findall(r"python ((?:analyses|benchmarks|tests)/\S+\.py)", text):
            is_gone = path in GONE and IN_GIT in text
            assert is_gone or (ROOT / path).is_file(), path
        for module in re.findall(r"python -m\s+(harmcircuits[.\w]+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


LINKED = [*PAGES, README, ROOT / "analyses" / "README.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_public_names_of_the_glossary_are_public():
    for name in re.findall(r"`hc\.(\w+)", "\n".join(ALL.values())):
        assert name in hc.__all__, name


def test_the_constants_of_the_method_are_those_of_the_search():
    *_, listed = blocks(text_of("method.md"), "text")
    pairs = [entry.split("=") for entry in listed.split()]
    on_the_page = {name: literal_eval(value) for name, value in pairs}
    in_code = {}
    for module in (gates, benefits, circuit, descent, schedule, texts):
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, int | float | tuple):
                in_code[name] = value
    del in_code["TRACE_INTERVAL"], in_code["Z"]  # change no mask
    assert on_the_page == {**in_code, "MIN_ANSWERS": MIN_ANSWERS}


def test_the_list_of_analyses_is_whole():
    folder = ROOT / "analyses"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for script in folder.glob("*.py"):
        assert f"`{script.name}`" in text
