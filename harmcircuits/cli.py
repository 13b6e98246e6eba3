"""`harmcircuits study` and `harmcircuits export`: their options are the fields of dataclasses."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from harmcircuits import __version__
from harmcircuits.studies.settings import (
    FOR_REAL_MODELS,
    QUICK_LIMIT,
    QUICK_SHARE,
    StudySettings,
    quick,
)

GIB = 2**30
QUICK_TEXT = "quick: few requests, steps and sizes, one search. A first look, and no result."
PROMPTS = (
    "harmful", "benign", "harmful_heldout", "benign_heldout", "pairs", "borderline", "plain",
    "limit", "limit_measured", "columns",
)  # fmt: skip


@dataclass(frozen=True)
class OwnModel:
    """The options of `open_model` for a model of one's own; what is left out is as it has it.

    Attributes:
        harmful: file of harmful requests (.jsonl, .json, .csv, .tsv, .txt, .parquet), or a dataset.
        benign: benign requests.
        harmful_heldout: held-out harmful requests, in place of a quarter of the others.
        benign_heldout: held-out benign requests, in place of a quarter of the others.
        pairs: safe and unsafe requests of matched content, for recognition.
        borderline: requests that only look unsafe.
        plain: text file for perplexity.
        limit: largest number of requests in a split; 0: all.
        limit_measured: the same in choice and held-out, where it differs.
        columns: which column holds what, such as: prompt goal.
        dtype: number format: float32, bfloat16 or float16; by default as stored.
        template: how requests are written: chat (by default: the model's own template) or raw.
        prefill: beginning of the answer to a harmful request; by default "Sure, here is".
        judge: of harm: local (by default: rules), probe, or http://ADDRESS/v1#MODEL.
        max_new_tokens: longest answer, in tokens; by default 64.
        batch_size: examples scored at once; by default 16.
        cache: folder that keeps the model's own answers.
    """

    harmful: str = ""
    benign: str = ""
    harmful_heldout: str = ""
    benign_heldout: str = ""
    pairs: str = ""
    borderline: str = ""
    plain: str = ""
    limit: int = 0
    limit_measured: int = 0
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    dtype: str = ""
    template: str = ""
    prefill: str = ""
    judge: str = ""
    max_new_tokens: int = 0
    batch_size: int = 0
    cache: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """What was not left out, as arguments of `open_model`."""
        options = {known.name: getattr(self, known.name) for known in fields(OwnModel)}
        options = {name: value for name, value in options.items() if value}
        prompts = {name: options.pop(name) for name in PROMPTS if name in options}
        return {"prompts": prompts, **options}


@dataclass(frozen=True)
class ModelOptions(OwnModel):
    """Which model, and what it is asked.

    Attributes:
        organism: model that ships: base, helpful, sft (by default), dpo or planted.
        organisms: folder of organisms that you trained.
        model: instead of an organism: folder or hub id; with --harmful and --benign.
        device: torch device, such as cpu (by default) or cuda.
    """

    organism: str = "sft"
    organisms: str = ""
    model: str = ""
    device: str = "cpu"

    def open(self, *, seed: int, is_quick: bool) -> Any:
        """The model; for a first look one that is asked less."""
        # Imported here: --help need not wait for it.
        from harmcircuits.opening import open_model
        from harmcircuits.organisms.shipped import FOLDER, open_organism

        given = self.given
        if self.model:
            if is_quick:
                given["prompts"]["limit"] = min(self.limit or QUICK_LIMIT, QUICK_LIMIT)
            return open_model(self.model, device=self.device, **given)
        unused = [*given.pop("prompts"), *given]
        if unused:
            raise ValueError(f"--{unused[0]} is for a model of your own; give --model too")
        folder = Path(self.organisms) if self.organisms else FOLDER
        opened = open_organism(self.organism, seed=seed, device=self.device, folder=folder)
        return opened.sampled(QUICK_SHARE, seed=0) if is_quick else opened


@dataclass(frozen=True)
class StudyCommand:
    """Find weights without which a behaviour goes, remove them, and measure what else is lost.

    Prints two tables; writes rows.jsonl, masks, manifest.json and report.html.

    Attributes:
        out: folder for what is written.
        settings: what is removed and protected, and the grid of masks.
        model: which model, and what it is asked; what is left out is as `open_model` has it.
        max_memory: GiB for scores; what takes more goes to disk. By default what is free.
        quick: a first look: few requests, steps and sizes, one search.
        resume: go on with the unfinished study of these options in --out.
        force: remove the study in --out first, finished or not.
    """

    out: Path
    settings: OmitArgPrefixes[StudySettings]
    model: OmitArgPrefixes[ModelOptions]
    max_memory: float | None = None
    quick: bool = False
    resume: bool = False
    force: bool = False

    def run(self) -> None:
        """Open the model, study it, and print what came out."""
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from harmcircuits.studies.run import PAGE, refuse_study_folder
        from harmcircuits.studies.study import study
        from harmcircuits.studies.summary import result_tables, summary

        disable_progress_bar()  # of transformers, between ours
        # Before hours of answers.
        refuse_study_folder(self.out, resume=self.resume, force=self.force)
        console = Console()
        if self.quick:
            console.print(QUICK_TEXT)
        finished = study(
            self.model.open(seed=self.settings.seed, is_quick=self.quick),
            self.settings,
            out=self.out,
            progress=True,
            max_memory="auto" if self.max_memory is None else round(self.max_memory * GIB),
            resume=self.resume,
            force=self.force,
        )
        console.print(*result_tables(finished.rows, finished.terms), sep="\n")
        text = f"{summary(finished.rows, finished.terms)}\nReport: {self.out / PAGE}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class ExportCommand:
    """Write the model without a mask's weights as a Hugging Face folder; reload it as a check.

    Attributes:
        model: folder or hub id of the model that the mask was made on, or an organism's name.
        mask: saved file, folder with mask.safetensors, or hub id.
        out: folder to write; it must not exist yet, or be empty.
        push_to: hub id to upload to, private if it is new.
        force: replace a folder that this command wrote.
        device: torch device, such as cpu or cuda.
    """

    model: str
    mask: str
    out: Path
    push_to: str = ""
    force: bool = False
    device: str = "cpu"

    def run(self) -> None:
        """Open the model and write it."""
        from harmcircuits.circuits.masks import WeightMask
        from harmcircuits.export import export
        from harmcircuits.hooks.loading import load_model
        from harmcircuits.organisms.shipped import ORGANISMS, load_organism

        mask = WeightMask.from_hub(self.mask)
        load = load_organism if self.model in ORGANISMS else load_model
        bridge = load(self.model, device=self.device)
        export(bridge, mask, self.out, push_to=self.push_to or None, force=self.force)
        print(f"{mask} exported: {self.out}")


USAGE = """usage: harmcircuits [--version] {study,export} [--help]

  study   find the weights behind a behaviour, remove them, and measure what else is lost
  export  write the model without a mask's weights as a Hugging Face folder"""


def parsed(arguments: Sequence[str]) -> StudyCommand | ExportCommand:
    """What a command line says: the command and its options."""
    name, *options = arguments
    prog, config = f"harmcircuits {name}", (FlagCreatePairsOff,)
    if name == "export":
        return tyro.cli(ExportCommand, args=options, prog=prog, config=config)
    # A model of one's own has other usual settings, and so has a first look.
    is_own = any(option.startswith("--model") for option in options)
    usual = FOR_REAL_MODELS if is_own else StudySettings()
    if "--quick" in options:
        usual = quick(usual)
    default = StudyCommand(tyro.MISSING, usual, ModelOptions())
    return tyro.cli(StudyCommand, args=options, prog=prog, config=config, default=default)


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Ends a command that cannot go on by a sentence: what a user can mend with exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept: give --resume to go on", file=sys.stderr)
        sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what a user can mend ends it in one sentence and with exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        print(f"harmcircuits {__version__}")
        return
    if not arguments or arguments[0] not in ("study", "export"):
        print(USAGE)
        sys.exit(0 if "--help" in arguments else 2)
    with in_one_sentence():
        parsed(arguments).run()


if __name__ == "__main__":
    main()
