"""Numbers that are NaN or infinite: which example they come from, and where in the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import isfinite
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harmcircuits.circuits.sites import Site
from harmcircuits.display import dtype_name, plural
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.gradients import hook_pairs, parameter_gradients
from harmcircuits.hooks.objectives import Objective
from harmcircuits.hooks.weights import named_weights
from harmcircuits.prompts import Batch

# Before the softmax, a position that may not be looked at has minus infinity in some architectures.
MAY_BE_INFINITE = "hook_attn_scores"


class NotFiniteError(ValueError):
    """A number that is NaN or infinite, where the result would be wrong."""

    def __init__(self, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.index = index


def refuse_not_finite(
    bridge: Bridge,
    batches: Sequence[Batch],
    values: Float[Tensor, " n"],
    objective: Objective,
) -> None:
    """Check the values of an objective."""
    if values.isfinite().all():
        return
    index = int((~values.isfinite()).int().argmax())
    example, place = _example(batches, index)
    _refuse_value(bridge, example, values[index].item(), objective, place, index)


def refuse_not_finite_gradients(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    loss: float,
    totals: Mapping[str, Tensor],
) -> None:
    """Check what was summed over all examples: the objective, and the gradient of every matrix."""
    overflown = [name for name, total in totals.items() if not _is_finite(total)]
    if isfinite(loss) and not overflown:
        return
    n_examples = sum(map(len, batches))
    for index in range(n_examples):
        example, place = _example(batches, index)
        with torch.no_grad():
            value = objective(bridge, example)
        _refuse_value(bridge, example, value[0].item(), objective, place, index)

        name = _in_backward(bridge, example, objective, sites)
        if name:
            # What stands in padding reaches no loss, but does reach the gradient's product.
            found = _in_forward(bridge, partial(objective, bridge, example))
            at_output = f"first at the output of {name}{_remedy(bridge)}"
            raise NotFiniteError(
                f"{place}: the gradient of {_name(objective)} is not finite; {found or at_output}",
                index,
            )
    # Each is finite, and only their sum is too large.
    if overflown:
        raise NotFiniteError(
            f"the gradients of {plural(n_examples, 'example')} at {overflown[0]} are finite, "
            f"their sum in float32 is not; make the objective {_name(objective)} smaller"
        )


def refuse_not_finite_inputs(
    bridge: Bridge,
    batches: Sequence[Batch],
    squares: Mapping[str, Tensor],
) -> None:
    """Check what was summed over all tokens of the inputs of matrices."""
    names = [name for name, values in squares.items() if not _is_finite(values)]
    if not names:
        return
    for index in range(sum(map(len, batches))):
        example, place = _example(batches, index)
        tokens = example.tokens.to(bridge.cfg.device)
        found = _in_forward(bridge, partial(bridge, tokens))
        if found:
            raise NotFiniteError(f"{place}: the input of {names[0]} is not finite; {found}", index)
    raise NotFiniteError(f"the inputs of {names[0]} are finite, their squares in float32 are not")


def refuse_not_finite_answers(
    place: str,
    bridge: Bridge,
    rows: Sequence[Sequence[int]],
    is_finite: Bool[Tensor, " n"],
) -> None:
    """Check that the logits by which something was chosen were finite."""
    if is_finite.all():
        return
    index = int((~is_finite).int().argmax())
    tokens = torch.tensor([rows[index]], device=bridge.cfg.device)
    found = _in_forward(bridge, partial(bridge, tokens))
    elsewhere = "in a pass over the whole text they are, so look at the cache of keys and values"
    raise NotFiniteError(
        f"{place} {index}: logits are not finite; {found or elsewhere}",
        index,
    )


@contextmanager
def of_data(name: str) -> Iterator[None]:
    """While open, an error about an example says whose it is."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{name}: {error}", error.index) from None


@contextmanager
def about_requests(requests: Sequence[tuple[str, int]]) -> Iterator[None]:
    """While open, an error about a row is about the request that the row is of."""
    try:
        yield
    except NotFiniteError as error:
        if error.index is None:
            raise
        name, number = requests[error.index]
        text = str(error).replace(f"request {error.index}:", f"request {number}:", 1)
        raise NotFiniteError(f"{name}: {text}" if name else text, number) from None


def _refuse_value(
    bridge: Bridge,
    example: Batch,
    value: float,
    objective: Objective,
    place: str,
    index: int,
) -> None:
    if isfinite(value):
        return
    found = _in_forward(bridge, partial(objective, bridge, example))
    itself = f"every activation of the model is finite, so look at {_name(objective)} itself"
    raise NotFiniteError(f"{place}: {_name(objective)} is {value}; {found or itself}", index)


def _is_finite(values: Tensor) -> bool:
    # A sum is finite only if every term is, and needs no copy; that of finite terms may overflow.
    total = values.sum(dtype=torch.float32).item()
    return isfinite(total) or bool(values.isfinite().all())


def _example(batches: Sequence[Batch], index: int) -> tuple[Batch, str]:
    """An example by its number among all, as a batch of its own, and what to call it."""
    row = index
    for number, batch in enumerate(batches):
        if row < len(batch):
            single = Batch(batch.tokens[row : row + 1], batch.is_target[row : row + 1])
            n_tokens = int(single.is_token.sum())
            place = f"example {index} (row {row} of batch {number}, {plural(n_tokens, 'token')})"
            return single, place
        row -= len(batch)
    raise IndexError(f"example {index} of {sum(map(len, batches))}")


def _in_forward(bridge: Bridge, run: Callable[[], Any]) -> str:
    """The first place where a pass has a number that is not finite, and what to do; or nothing."""
    of_weights = _in_weights(bridge)
    if of_weights:
        return of_weights

    names: list[str] = []

    def look(value: Any, hook: Any) -> None:
        if names or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        is_scores = hook.name.endswith(MAY_BE_INFINITE)
        is_bad = value.isnan() if is_scores else ~value.isfinite()
        if is_bad.any():
            names.append(hook.name)

    with torch.no_grad(), catch_warnings():
        # TransformerLens warns of points that the model's settings keep silent.
        simplefilter("ignore", UserWarning)
        with bridge.hooks(fwd_hooks=[(lambda _: True, look)]):
            run()
    if not names:
        return ""
    return f"the first activation that is not finite is {names[0]}{_remedy(bridge)}"


def _in_weights(bridge: Bridge) -> str:
    """The first weight that is not finite; nothing where all are."""
    values = {**bridge.state_dict(keep_vars=True), **dict(bridge.named_parameters())}
    with suppress(ValueError):  # of a model that cannot be scored
        values = {**named_weights(bridge), **values}  # first by the names that scores give them
    for name, value in values.items():
        is_weight = isinstance(value, torch.nn.Parameter) and value.is_floating_point()
        if not is_weight or value.is_meta or _is_finite(value.detach()):
            continue
        n_bad = int((~value.isfinite()).sum())
        kind = dtype_name(value.dtype)
        other = " in bfloat16 or float32" if value.dtype == torch.float16 else ""
        return (
            f"{name} holds {plural(n_bad, 'value')} that {'is' if n_bad == 1 else 'are'} NaN or "
            f"infinite ({kind}); open the model again{other}, from a file that is whole"
        )
    return ""


def _in_backward(
    bridge: Bridge,
    example: Batch,
    objective: Objective,
    sites: Mapping[str, Site],
) -> str:
    """The matrix at which the backward pass first meets a gradient that is not finite; or none."""
    names: list[str] = []

    def look(site: Site, *values: Tensor) -> None:
        if not all(value.isfinite().all() for value in values):
            names.append(site.name)

    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
    with (
        torch.enable_grad(),
        hook_pairs(bridge, hooked, look),
        parameter_gradients(unhooked, look),
    ):
        objective(bridge, example).sum().backward()
    return names[0] if names else ""


def _name(objective: Objective) -> str:
    function = objective.func if isinstance(objective, partial) else objective
    return getattr(function, "__name__", type(function).__name__).removeprefix("_")


def _remedy(bridge: Bridge) -> str:
    """In which dtype it happened, and what to do about it."""
    dtype = next(bridge.parameters()).dtype
    if dtype == torch.float16:
        return (
            ", in float16, which ends at 65,504; open the model with dtype='bfloat16' or 'float32'"
        )
    return (
        f", in {dtype_name(dtype)}; numbers of this size come of weights that are damaged, or that "
        "training has driven away: open the model again"
    )
