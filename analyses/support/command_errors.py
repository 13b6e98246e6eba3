"""How a command warns, and how it ends early: by a sentence, in the words of the command line."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import typer
from rich.console import Console
from rich.markup import escape

try:  # typer brings its own click from 0.20 on
    from typer._click.globals import get_current_context
except ImportError:
    from click import get_current_context

# Arguments of the library that go by another name on the command line.
SAME_AS = {"include_path": "tasks_from", "size": "sizes", "budget_of": "budgets", "path": "mask"}
FUNCTIONS = re.compile(
    r"^(?:find_circuit|evaluate_tasks|export|masked|open_model|study|run_jobs|weight_sites): "
)
RESUMES = "what is finished is kept: give --resume to go on"


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends a command in one sentence on standard error where it cannot go on; no traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except ValueError as error:
        raise ended(str(error), 2) from None
    except KeyboardInterrupt:
        raise ended(f"interrupted{_resumed()}", 130) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        text = f"out of memory ({_first_line(error)}); give a smaller batch_size= or max_memory="
        raise ended(text + _resumed(), 1) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or _first_line(error)
        text = f"{place}{reason}; make room there, or give another place"
        raise ended(text + _resumed(), 1) from None
    except RuntimeError as error:
        # Of the device: its driver's errors come as these.
        if not re.search(r"CUDA|HIP|MPS|cuDNN|CUBLAS", str(error)):
            raise
        text = f"the device failed ({_first_line(error)})"
        raise ended(text + _resumed(), 1) from None


def ended(text: str, code: int) -> typer.Exit:
    """The end of a command, after the reason is printed."""
    _print_sentence("[bold red]error:[/]", text)
    return typer.Exit(code)


def _show_warning(message: Warning | str, *_: object) -> None:
    _print_sentence("[bold yellow]warning:[/]", str(message))


def _print_sentence(start: str, text: str) -> None:
    sentence = escape(in_options(" ".join(text.split()), _flags()))
    Console(stderr=True).print(f"{start} {sentence}", highlight=False, soft_wrap=True)


def in_options(text: str, flags: Mapping[str, str]) -> str:
    """A message of the library in the words of a command line."""
    text = FUNCTIONS.sub("", text)
    for name, flag in flags.items():
        pair = rf"(?<![\w.'-]){name}=\{{'([\w.]+)': '?(\w+)'?\}}"
        text = re.sub(pair, rf"{flag} \1=\2", text)
        text = re.sub(rf"(?<![\w.'-]){name}=True\b", flag, text)
        text = re.sub(rf"(?<![\w.'-]){name}= ?(?![=\s])", f"{flag} ", text)
        text = re.sub(rf"(?<![\w.'-]){name}=(?=[\s,;)]|$)", flag, text)
        text = re.sub(rf"^{name}(?=: )", flag, text)
    return text


def _flags() -> dict[str, str]:
    """The option of each argument of the command that runs."""
    context = get_current_context(silent=True)
    parameters = context.command.params if context is not None else []
    flags: dict[str, str] = {}
    for parameter in parameters:
        options = [option for option in parameter.opts if option.startswith("--")]
        if parameter.name and options:
            flags[parameter.name] = options[0]
    for name, same in SAME_AS.items():
        if same in flags and name not in flags:
            flags[name] = flags[same]
    return flags


def _resumed() -> str:
    """What is to be done where the command can go on."""
    return f"; {RESUMES}" if "resume" in _flags() else ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
