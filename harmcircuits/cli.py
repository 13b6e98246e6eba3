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
from harmcircuits.behaviours.request_files import RequestFiles
from harmcircuits.studies.settings import (
    FOR_REAL_MODELS,
    QUICK_LIMIT,
    QUICK_SHARE,
    StudySettings,
    quick_settings,
)

GIB = 2**30
QUICK_TEXT = "quick: few requests, steps and sizes, one search. A first look, and no result."
COMMANDS = ("study", "export")


@dataclass(frozen=True)
class OwnModel:
    """Options of `open_model`; omitted ones keep its defaults.

    Attributes:
        harmful: file of harmful requests (.jsonl, .json, .csv, .tsv, .txt, .parquet), or a dataset.
        benign: benign requests.
        harmful_heldout: held-out harmful requests; they replace a quarter of the others.
        benign_heldout: held-out benign requests; they replace a quarter of the others.
        pairs: safe and unsafe requests with matched content, for recognition.
        borderline: requests that only look unsafe.
        plain: text file for perplexity.
        limit: largest number of requests in a split; 0: all.
        limit_measured: the same for choice and held-out, if it differs.
        columns: the meaning of a file's columns, such as: prompt goal.
        dtype: number format: float32, bfloat16 or float16; by default as stored.
        template: how requests are written: chat (default: the model's own template) or raw.
        prefill: beginning of the answer to a harmful request; by default "Sure, here is".
        judge: judge of harm: local (default: rules), probe, or http://ADDRESS/v1#MODEL.
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
    def arguments(self) -> dict[str, Any]:
        """The options without omitted ones, as arguments of `open_model`."""
        arguments: dict[str, Any] = {"prompts": {}}
        for option in fields(OwnModel):
            value = getattr(self, option.name)
            is_request = option.name in RequestFiles.__dataclass_fields__
            if value:
                (arguments["prompts"] if is_request else arguments)[option.name] = value
        return arguments


@dataclass(frozen=True)
class ModelOptions(OwnModel):
    """The model and its requests.

    Attributes:
        organism: model that ships with the package: base, helpful, sft (default), dpo or planted.
        organisms: folder of organisms that you trained.
        model: folder or hub id of another model; needs --harmful and --benign.
        device: torch device, such as cpu (default) or cuda.
    """

    organism: str = "sft"
    organisms: str = ""
    model: str = ""
    device: str = "cpu"

    def open(self, *, seed: int, is_quick: bool) -> Any:
        """The model; for a first look with fewer requests."""
        # Imported here, so that --help does not wait for it.
        from harmcircuits.opening import open_model
        from harmcircuits.organisms.shipped import FOLDER, open_organism

        arguments = self.arguments
        prompts = arguments["prompts"]
        if self.model:
            if is_quick:
                prompts["limit"] = min(self.limit or QUICK_LIMIT, QUICK_LIMIT)
            return open_model(self.model, device=self.device, **arguments)
        for option in (*prompts, *arguments):
            if option != "prompts":
                raise ValueError(f"--{option} is for a model of your own; give --model too")
        folder = Path(self.organisms) if self.organisms else FOLDER
        model = open_organism(self.organism, seed=seed, device=self.device, folder=folder)
        return model.sampled(QUICK_SHARE, seed=0) if is_quick else model


@dataclass(frozen=True)
class StudyCommand:
    """Find the weights that a behaviour needs, remove them, and measure what else is lost.

    Prints two tables; writes rows.jsonl, masks, manifest.json and report.html.

    Attributes:
        out: folder for all files.
        settings: what the study removes and protects, and the grid of masks.
        model: the model and its requests; omitted options keep the defaults of `open_model`.
        max_memory: GiB for scores; larger ones go to disk. By default the free memory.
        quick: a first look: few requests, steps and sizes, one search.
        resume: continue the unfinished study with these options in --out.
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
        """Open the model, study it, and print the result."""
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from harmcircuits.studies.run import PAGE, refuse_study_folder
        from harmcircuits.studies.study import study
        from harmcircuits.studies.summary import result_tables, summary

        disable_progress_bar()  # of transformers, between ours
        # Refused now, not after hours of answers.
        refuse_study_folder(self.out, resume=self.resume, force=self.force)
        console = Console()
        if self.quick:
            console.print(QUICK_TEXT)
        run = study(
            self.model.open(seed=self.settings.seed, is_quick=self.quick),
            self.settings,
            out=self.out,
            progress=True,
            max_memory="auto" if self.max_memory is None else round(self.max_memory * GIB),
            resume=self.resume,
            force=self.force,
        )
        console.print(*result_tables(run.rows, run.roles), sep="\n")
        text = f"{summary(run.rows, run.roles)}\nReport: {self.out / PAGE}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class ExportCommand:
    """Write the model without a mask's weights as a Hugging Face folder; reload it as a check.

    Attributes:
        model: folder or hub id of the mask's model, or an organism's name.
        mask: saved file, folder with mask.safetensors, or hub id.
        out: new or empty folder.
        push_to: hub id to upload to; private if it is new.
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
        """Open the model, and write it without the mask's weights."""
        from harmcircuits.circuits.masks import WeightMask
        from harmcircuits.export import export
        from harmcircuits.hooks.loading import load_model
        from harmcircuits.organisms.compiled import COMPILED
        from harmcircuits.organisms.shipped import ORGANISMS, load_organism

        mask = WeightMask.from_hub(self.mask)
        load = load_organism if self.model in (*ORGANISMS, *COMPILED) else load_model
        bridge = load(self.model, device=self.device)
        export(bridge, mask, self.out, push_to=self.push_to or None, force=self.force)
        print(f"{mask} exported: {self.out}")


USAGE = """usage: harmcircuits [--version] {study,export} [--help]

  study   find the weights behind a behaviour, remove them, and measure what else is lost
  export  write the model without a mask's weights as a Hugging Face folder"""


def parsed(arguments: Sequence[str]) -> StudyCommand | ExportCommand:
    """The command of a command line, with its options."""
    name, *options = arguments
    command: dict[str, Any] = {
        "args": options,
        "prog": f"harmcircuits {name}",
        "config": (FlagCreatePairsOff,),
    }
    if name == "export":
        return tyro.cli(ExportCommand, **command)
    # The defaults of all other options depend on --model and --quick.
    defaults, _ = tyro.cli(default_settings, **command, add_help=False, return_unknown_args=True)
    default = StudyCommand(tyro.MISSING, defaults, ModelOptions())
    return tyro.cli(StudyCommand, **command, default=default)


def default_settings(model: str = "", quick: bool = False) -> StudySettings:
    """The default settings of a study: other models and first looks have their own."""
    settings = FOR_REAL_MODELS if model else StudySettings()
    return quick_settings(settings) if quick else settings


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Errors that a user can mend end the program with a sentence and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; all finished work is kept: give --resume to continue", file=sys.stderr)
        sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that a user can mend ends it with a sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        print(f"harmcircuits {__version__}")
        return
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE)
        sys.exit(0 if "--help" in arguments else 2)
    with in_one_sentence():
        parsed(arguments).run()


if __name__ == "__main__":
    main()
