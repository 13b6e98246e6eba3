"""A study's page: its rows become lines, figures and views; `study_page.html` has the words."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.repeats import repeats_text
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.overlap import overlap
from harmcircuits.hooks.inspection import attention_patterns, token_changes, token_texts
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.run import Study
from harmcircuits.studies.summary import (
    JUDGE,
    SAME_SIZE,
    SATURATED_NLL,
    SELECTIONS,
    Roles,
    diagnostics_lines,
    headline,
    held_out_lines,
    judge_lines,
    summary,
    tradeoff_lines,
)
from harmcircuits.views.circuitsvis import attention_pairs, circuitsvis_script, coloured_tokens
from harmcircuits.views.figures import (
    Picture,
    comparison_figure,
    location_figure,
    share_figure,
)
from harmcircuits.views.page import write_page
from harmcircuits.views.tables import DASH, columns_of, interval_text, size_text

N_EXAMPLES = 4  # requests of a behaviour
N_HEADS = 4


def write_study_page(study: Study, path: str | Path) -> None:
    """Write the page of a finished study."""
    rows, roles = study.rows, study.roles
    lines = held_out_lines(rows, roles)
    bars = ["unpruned", "random", roles.twin]
    for selection in SELECTIONS:
        bars += [selection, f"{selection}, {SAME_SIZE}"]
    compared = {name: line for name, line in lines.items() if name in bars}

    templates = Environment(loader=PackageLoader("harmcircuits", ""), autoescape=True)
    body = templates.get_template("studies/study_page.html").render(
        headline=headline(rows, roles),
        summary=summary(rows, roles).splitlines(),
        bars=_svg(comparison_figure(compared, roles.rates)),
        rates=_table(lines, roles.rates, is_rate=True),
        losses=_table(lines, roles.losses, is_rate=False),
        tradeoff=_svg(tradeoff_figure(rows, roles)) if tradeoff_lines(rows) else "",
        circuit=_circuit(study, study.choice.mask) if study.choice else None,
        examples=_examples(study, study.choice.mask) if study.choice else None,
        is_invented=study.model.is_invented,
        judge_head=JUDGE,
        judge=judge_lines(rows),
        diagnostics=diagnostics_lines(rows),
        saturated=SATURATED_NLL,
        prefer=study.prefer,
        repeats=repeats_text(rows),
        version=version("harmcircuits"),
    )
    title = f"The weights behind {roles.target.name} answers in {study.model.name}"
    write_page(path, title, [body], script=circuitsvis_script())


def tradeoff_figure(rows: Rows, roles: Roles) -> Picture:
    """The target and the worst kept ability against the share of weights removed (choice split)."""
    target = roles.target
    panels = {
        target.metric: roles.valid_answers,
        target.nll_metric: f"{target.title} NLL, nats per token",
    }
    return share_figure(tradeoff_lines(rows), panels, abilities=roles.kept_rates)


def _svg(figure: Picture) -> Markup:
    return Markup(figure.svg("none"))


def _table(lines: Mapping[str, Rows], titles: Mapping[str, str], *, is_rate: bool) -> dict:
    """Head and body of a table: a line for each mask, a column for each metric."""
    columns = columns_of(lines, titles)
    body = []
    for name, rows in lines.items():
        figures = [interval_text(rows, metric, is_rate=is_rate) for metric in columns]
        body.append([name, size_text(rows), *figures])
    return {"head": ["mask", "weights", *columns.values()], "body": body}


def _circuit(study: Study, circuit: WeightMask) -> dict[str, Any]:
    """What the circuit shares with other masks, where it sits, and its file."""
    lines = []
    for name, title in study.titles.items():
        mask = study.masks[name]
        cells = [title, f"{mask.n_removed:,}"]
        if not mask.n_removed:
            lines.append([*cells, DASH, DASH, "the mask is empty"])
            continue
        pair = overlap(circuit, mask)
        low, high = pair.interval
        lift = f"{pair.lift:.1f}\n{low:.1f} – {high:.1f}"
        lines.append([*cells, f"{pair.n_shared:,}", f"{pair.jaccard:.3f}", lift])

    with TemporaryDirectory() as folder:
        path = Path(folder) / "circuit.safetensors"
        circuit.save(path)
        content = b64encode(path.read_bytes()).decode()
    location = location_figure(study.rows.where("weights_removed", by="matrix"))
    return {"shared": lines, "location": _svg(location), "file": content}


def _examples(study: Study, circuit: WeightMask) -> dict[str, Any] | None:
    """Tokens, answers and attention of a few requests; None where the texts may be harmful."""
    if not study.model.is_invented:
        return None
    roles = study.roles
    tokens, answers = {}, []
    for behaviour in (roles.target, roles.contrast):
        requests = _sample(behaviour.prompts("heldout"))
        tokens[behaviour.name] = _tokens(study, circuit, behaviour, requests)
        answers += _answers(study, circuit, behaviour, requests)
    attention = _attention(study, circuit, _sample(roles.target.prompts("heldout")))
    return {"tokens": tokens, "answers": answers, "attention": attention}


def _sample(prompts: PromptSet) -> PromptSet:
    """A few requests, evenly over the set: requests of one topic follow each other."""
    step = max(1, len(prompts) // N_EXAMPLES)
    return prompts[::step][:N_EXAMPLES]


def _tokens(
    study: Study,
    circuit: WeightMask,
    behaviour: Behaviour,
    requests: PromptSet,
) -> Markup:
    """Each reference answer with its request, coloured by the circuit's effect on every token."""
    bridge = study.model.bridge
    batch = study.model.batches(behaviour, requests)[0]
    changes = token_changes(bridge, circuit, batch)  # [example, pos]
    # One scale for all examples; above 0, even where the mask changes nothing.
    largest = max(changes[batch.is_token].abs().max().item(), 1e-6)
    html = ""
    for number in range(len(batch)):
        words = token_texts(bridge, batch, number)
        values = changes[number][batch.is_token[number]]
        html += coloured_tokens(words, values, largest=largest).html()
    return Markup(html)


def _answers(
    study: Study,
    circuit: WeightMask,
    behaviour: Behaviour,
    requests: PromptSet,
) -> list[Sequence[str]]:
    """Request, unpruned answer, pruned answer and its verdict, of each request."""
    model = study.model
    unpruned = model.answers(behaviour, requests)
    with masked(model.bridge, circuit):
        pruned = model.answers(behaviour, requests)
    columns = (
        [example.prompt for example in pruned],
        [example.completion for example in unpruned],
        [example.completion for example in pruned],
        model.verdicts(behaviour, pruned),
    )
    return list(zip(*columns, strict=True))


def _attention(study: Study, circuit: WeightMask, requests: PromptSet) -> Markup:
    """Attention of the most pruned heads on the first request, without and with the circuit."""
    bridge = study.model.bridge
    n_removed: dict[tuple[int, int], float] = {}
    for row in study.rows.where("weights_removed", by="head", kind="head"):
        head = (int(row.labels["layer"]), int(row.labels["index"]))
        n_removed[head] = n_removed.get(head, 0) + row.mean
    heads = sorted(n_removed, key=lambda head: -n_removed[head])[:N_HEADS]

    batch = study.model.batches(study.roles.target, requests)[0]
    unpruned = attention_patterns(bridge, batch, heads)
    with masked(bridge, circuit):
        pruned = attention_patterns(bridge, batch, heads)
    view = attention_pairs(token_texts(bridge, batch), unpruned, pruned, heads)
    return Markup(view.html())
