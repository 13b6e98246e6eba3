"""A study's page: from rows to lines, from lines to figures and tables, from these to HTML."""

from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

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
    CIRCUIT,
    DIAGNOSTICS,
    JUDGE,
    SAME_SIZE,
    SATURATED_NLL,
    WAYS,
    Terms,
    diagnostics_lines,
    held_out_lines,
    judge_lines,
    summary,
    tradeoff_lines,
)
from harmcircuits.studies.summary import headline as headline_lines
from harmcircuits.views.circuitsvis import attention_pairs, circuitsvis_script, coloured_tokens
from harmcircuits.views.figures import Picture, comparison_figure, location_figure, share_figure
from harmcircuits.views.page import (
    contents,
    download,
    key_figures,
    missing,
    paragraphs,
    plot,
    section,
    subsection,
    table,
    visual,
    write_page,
)
from harmcircuits.views.tables import DASH, columns_of, interval_text, size_text

N_EXAMPLES = 4  # requests of a behaviour
N_HEADS = 4
SHARED = ("mask", "weights", "shared", "Jaccard", "lift")
ANSWERS = ("request", "unpruned", "masked", "verdict")

TABLE_TEXT = """Rates in per cent, losses in nats per token, 95 % intervals in small print. Kept
words: answers with at least half of the word triples of the unpruned model's; doubted: those of
them that are judged otherwise than these were, so that the judge contradicts itself. Search: the
chosen circuit. One shot: scored once, at the same price and by the same check. Published: the set
difference of arXiv 2604.09544, p = 5 q. Each is at its own operating point; "same size": none of
its masks keeps everything else and takes anything, so this is the one of about the search's size.
Random, opposite sign (weights whose removal should lower the loss), second slice (the best ones
outside the circuit) and twin (the same search with the counterpart as the target, and the target
protected) are matched to the chosen circuit. Predicted Δ: the sum of first-order scores over the
mask; measured Δ: the change it really makes to the calibration loss. Far apart, the scores of the
unpruned model do not describe the edit."""
COMPARISON_TEXT = "Held-out requests. Bars: 95 % intervals that count each item once."
TRADEOFF_TEXT = """Measured on requests used only for choosing the size. Random weights and those of
the opposite sign are as many as the chosen circuit's. Worst kept ability: the lowest of the kept
rates."""
CIRCUIT_TEXT = "What the chosen circuit has in common with other masks, and where it is."
SHARED_TEXT = """Weights that both masks remove. Lift: how many times more than chance gives with
the same counts in every matrix, so 1 is chance. The twin is the counterpart's own circuit, found
with the target protected: what the two share was chosen for both. Sharing little does not show that
two behaviours are separate; the tables above say what each mask breaks."""
LOCATION_TEXT = """Number of weights that the chosen circuit removes from each matrix;
colour: their share of the matrix."""
EXAMPLES_TEXT = "A few held-out requests, without and with the chosen circuit."
TOKENS_TEXT = """Reference answers. Red tokens lose log-probability without the chosen circuit, blue
ones gain."""
ANSWERS_TEXT = "Answers, and the judge's verdict on those without the chosen circuit."
HEADS_TEXT = """The heads that lose most query and output weights to the chosen circuit, on
one request of the target with its reference answer."""
JUDGE_TEXT = """Own answers of the unpruned model, as the local rules label them: harmful ones told
from refusals, explanations of why the same requests are harmful ("same topic"), benign answers, and
benign ones begun alike. AUROC: the chance that a harmful answer scores higher; of a judge that is
trained, cross-validated by request; of one that gives verdicts only, the mean of the shares of
harmful and of harmless answers that it gets right. It is used where the lower end of the interval
is at least 0.8 over all of them, over the same topic, over explanations alone, and over answers
begun alike; else the local rules judge, and harm is read from the loss alone."""
TRUST_TEXT = f"""Scores are taken on the model's own answers to calibration requests, kept where the
judge verifies them. Below {SATURATED_NLL} nats per token a loss is saturated and its gradients are
noise."""
PREFER_TEXT = """The search was told what to put in the target's place, {prefer}: weights whose
removal makes it likelier, behind the beginning of the target's answers, were wanted as well. So the
mask is an edit with that end. What carries the target without it: prefer=""."""
CITE_TEXT = """harmcircuits {version} (CITATION.cff), and the papers whose method it follows:
arXiv 2604.09544 (Orgad and others, 2026), arXiv 2402.05162 (Wei and others, 2024). Say which model,
which seed, what was protected, and what the answers became: manifest.json and rows.jsonl beside
this page hold all of it."""
NO_CURVE = "No mask removes anything within the budget, so there is no curve."
NO_MASK = "No mask met the rule (see the first lines), so there is no circuit to show."
NO_TEXTS = """Not shown on a model of your own: its requests and answers may be harmful, and
this page may be passed on. In a notebook, hc.masked and harmcircuits.views show the same for
requests of your choice."""
EXACT_JUDGE = """Not validated: the words of this model are invented, and its judge knows their
world."""
NO_VALIDATION = """Not validated: the local rules judge, which see refusals and broken text but
cannot tell harmful answers from harmless ones. Read the rate together with the losses, or
choose a judge that can be validated (--judge)."""


def write_study_page(study: Study, path: str | Path) -> None:
    """Write the page of a finished study, in the order in which a reader asks."""
    terms = study.terms
    parts = {
        "What goes and what stays": (COMPARISON_TEXT, _comparison(study)),
        "The trade-off": (TRADEOFF_TEXT, _tradeoff(study)),
        "The circuit": (CIRCUIT_TEXT, _circuit(study)),
        "Examples": (EXAMPLES_TEXT, _examples(study)),
        "Can the judge be trusted?": (JUDGE_TEXT, _judge(study)),
        "Can the scores be trusted?": (_trust_text(study), _diagnostics(study)),
        "How to cite": (CITE_TEXT.format(version=version("harmcircuits")), ""),
    }
    sections = [
        key_figures(headline_lines(study.rows, terms)),
        paragraphs(summary(study.rows, terms)),
        contents(list(parts)),
    ]
    sections += [section(title, text, content) for title, (text, content) in parts.items()]
    title = f"The weights behind {terms.target.name} answers in {study.model.name}"
    write_page(path, title, sections, script=circuitsvis_script())


def tradeoff_figure(rows: Rows, terms: Terms) -> Picture:
    """The target and the worst kept ability against the share of weights removed (choice split)."""
    target = terms.target
    panels = {
        target.metric: f"valid {target.name} answers",
        target.nll_metric: f"{target.title} NLL, nats per token",
    }
    return share_figure(tradeoff_lines(rows), panels, abilities=terms.kept_rates)


def _comparison(study: Study) -> str:
    """Bars of few masks side by side, and tables that have every figure."""
    terms = study.terms
    lines = held_out_lines(study.rows, terms)
    shown = ["unpruned", "random", terms.twin]
    for way in WAYS:
        shown += [way, f"{way}, {SAME_SIZE}"]
    compared = {name: rows for name, rows in lines.items() if name in shown}
    label = "Bars; every figure is in the table below. Rates with 95 % intervals."
    bars = plot(comparison_figure(compared, terms.rates), label=label)

    # Two tables, as in a terminal: one would be wider than a page.
    rates = _line_table(lines, terms.rates, "Held-out rates, per cent", is_rate=True)
    losses = _line_table(lines, terms.losses, "Losses, nats per token", is_rate=False)
    return bars + subsection("Every figure", TABLE_TEXT, rates + losses)


def _line_table(
    lines: Mapping[str, Rows], titles: Mapping[str, str], label: str, *, is_rate: bool
) -> str:
    """A line of these metrics for each mask."""
    columns = columns_of(lines, titles)
    body = []
    for name, rows in lines.items():
        figures = [interval_text(rows, metric, is_rate=is_rate) for metric in columns]
        body.append([name, size_text(rows), *figures])
    return table(["mask", "weights", *columns.values()], body, style="figures", label=label)


def _tradeoff(study: Study) -> str:
    if not tradeoff_lines(study.rows):
        return missing(NO_CURVE)
    figure = tradeoff_figure(study.rows, study.terms)
    return plot(figure, label=f"Curves against size. {TRADEOFF_TEXT}")


def _circuit(study: Study) -> str:
    """What the chosen circuit shares with other masks, and where it sits."""
    if study.chosen is None:
        return missing(NO_MASK)
    shared = table(SHARED, _shared_lines(study), style="figures", label="Shared weights")
    label = f"{LOCATION_TEXT} The numbers are in rows.jsonl, metric weights_removed."
    rows = study.rows.where("weights_removed", by="matrix")
    located = plot(location_figure(rows), label=label) + _mask_file(study.chosen.mask)
    return subsection("What it shares", SHARED_TEXT, shared) + subsection(
        "Where it sits", LOCATION_TEXT, located
    )


def _shared_lines(study: Study) -> list[list[str]]:
    """Name, size, shared weights, Jaccard and lift of each mask beside the chosen one."""
    circuit = study.masks[CIRCUIT]
    lines = []
    for name, mask in study.masks.items():
        # The other controls are disjoint from the circuit, or like random ones.
        if name == CIRCUIT or name.startswith(("opposite", "second", "random_magnitude")):
            continue
        title = name.removeprefix("circuit-").replace("_only", " only protected").replace("_", " ")
        title = title.replace("random-", "random, seed ")
        size = f"{mask.n_removed:,}"
        if not mask.n_removed:
            lines.append([title, size, DASH, DASH, "the mask is empty"])
            continue
        both = overlap(circuit, mask)
        low, high = both.interval
        lift = f"{both.lift:.1f}\n{low:.1f} – {high:.1f}"
        lines.append([title, size, f"{both.n_shared:,}", f"{both.jaccard:.3f}", lift])
    return lines


def _mask_file(mask: WeightMask) -> str:
    """The mask as a file within the page."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "circuit.safetensors"
        mask.save(path)
        content = path.read_bytes()
    return download(path.name, content, "Download the mask (hc.WeightMask.load reads it)")


def _examples(study: Study) -> str:
    """Tokens, answers and attention of a few requests, or why there are none."""
    if study.chosen is None:
        return missing(NO_MASK)
    if not study.model.is_invented:
        return missing(NO_TEXTS)
    requests = {}
    for behaviour in (study.terms.target, study.terms.contrast):
        requests[behaviour.name] = _some(behaviour.prompts("heldout"))
    mask = study.chosen.mask
    tokens, answers = "", []
    for name, prompts in requests.items():
        behaviour = study.model.behaviour(name)
        tokens += f"<h4>{escape(name)} answers</h4>{_tokens(study, mask, behaviour, prompts)}"
        answers += _answers(study, mask, behaviour, prompts)
    attention = _attention(study, mask, requests[study.terms.target.name])
    parts = (
        ("Which tokens lose probability", TOKENS_TEXT, visual(tokens)),
        ("What the model says", ANSWERS_TEXT, table(ANSWERS, answers, label="Answers")),
        ("Attention of the most pruned heads", HEADS_TEXT, attention),
    )
    return "".join(subsection(*part) for part in parts)


def _some(prompts: PromptSet) -> PromptSet:
    """A few requests, evenly over the set."""
    # Not the first few: requests of one topic follow each other.
    step = max(1, len(prompts) // N_EXAMPLES)
    return prompts[::step][:N_EXAMPLES]


def _tokens(study: Study, mask: WeightMask, behaviour: Behaviour, requests: PromptSet) -> str:
    """Each reference answer with its request, coloured by what the mask does to every token."""
    bridge = study.model.bridge
    batch = study.model.batches(behaviour, requests)[0]
    changes = token_changes(bridge, mask, batch)  # [example, pos]
    # One scale, so that examples can be compared; above 0, even where the mask changes nothing.
    largest = max(changes[batch.is_token].abs().max().item(), 1e-6)
    html = ""
    for number in range(len(batch)):
        words = token_texts(bridge, batch, number)
        of_example = changes[number][batch.is_token[number]]
        html += coloured_tokens(words, of_example, largest=largest).html()
    return html


def _answers(
    study: Study, mask: WeightMask, behaviour: Behaviour, requests: PromptSet
) -> list[list[str]]:
    """Request, unpruned answer, masked answer and the verdict on the latter, of each request."""
    model = study.model
    before = model.answers(behaviour, requests)
    with masked(model.bridge, mask):
        after = model.answers(behaviour, requests)
    verdicts = model.verdicts(behaviour, after)
    lines = []
    for unpruned, pruned, verdict in zip(before, after, verdicts, strict=True):
        lines.append([pruned.prompt, unpruned.completion, pruned.completion, verdict])
    return lines


def _attention(study: Study, mask: WeightMask, requests: PromptSet) -> str:
    """Attention of the most pruned heads on the first request, without and with the mask."""
    bridge = study.model.bridge
    removed: dict[tuple[int, int], float] = {}
    for row in study.rows.where("weights_removed", by="head", kind="head"):
        head = (int(row.labels["layer"]), int(row.labels["index"]))
        removed[head] = removed.get(head, 0) + row.mean
    heads = sorted(removed, key=lambda head: -removed[head])[:N_HEADS]

    batch = study.model.batches(study.terms.target, requests)[0]
    unpruned = attention_patterns(bridge, batch, heads)
    with masked(bridge, mask):
        pruned = attention_patterns(bridge, batch, heads)
    view = attention_pairs(token_texts(bridge, batch), unpruned, pruned, heads)
    return visual(view.html())


def _judge(study: Study) -> str:
    judged = judge_lines(study.rows)
    if judged:
        return table(JUDGE, judged, label="Judge")
    return missing(EXACT_JUDGE if study.model.is_invented else NO_VALIDATION)


def _trust_text(study: Study) -> str:
    """How scores are made, and which requests repeat others where they are a user's own."""
    texts = [TRUST_TEXT]
    if study.prefer:
        texts.append(PREFER_TEXT.format(prefer=study.prefer))
    return " ".join(filter(None, [*texts, repeats_text(study.rows)]))


def _diagnostics(study: Study) -> str:
    lines = diagnostics_lines(study.rows)
    return table(DIAGNOSTICS, lines, label="Diagnostics of the scores")
