"""The model comes back, whatever happens while it is edited.

Would catch: a line of entering, body or leaving at which an interrupt leaves zeros, hooks or flags
behind; a pair of masks that are left in the other order; a second thread that reads half an edit; a
weight that was cast, replaced, quantised, folded, trained or copied into and stays as it is in
silence.
"""

import contextlib
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_batch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_masking import a_mask
from torch.optim import optimizer as torch_optimizer

from harmcircuits.behaviours import generation
from harmcircuits.behaviours.generation import generate
from harmcircuits.hooks import finetuning, layers, masking, overlay
from harmcircuits.hooks.finetuning import Lora, fine_tuning
from harmcircuits.hooks.finite import NotFiniteError
from harmcircuits.hooks.layers import layers_on
from harmcircuits.hooks.masking import masked, restore, unmasked
from harmcircuits.hooks.overlay import Edit
from harmcircuits.hooks.weights import named_weights
from harmcircuits.prompts import PromptSet

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TRACED = [contextlib.__file__]
for module in (layers, overlay, masking, finetuning, generation):
    TRACED.append(module.__file__)
BITS = {2: torch.int16, 4: torch.int32}


class State:
    """Everything of a model that an edit must leave as it is."""

    def __init__(self, bridge) -> None:
        self.values = {}
        self.marks = {}
        for name, parameter in bridge.original_model.named_parameters():
            flat = parameter.detach().clone().contiguous()
            self.values[name] = flat.view(BITS[flat.itemsize])
            # Hooks may be None or an empty dictionary.
            hooks = len(parameter._backward_hooks or ())
            hooks += len(parameter._post_accumulate_grad_hooks or ())
            grad = parameter.grad
            self.marks[name] = (parameter.requires_grad, hooks, id(grad), parameter.dtype)
        for name, module in bridge.original_model.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            self.marks[f"module {name}"] = (module.training, *map(len, hooks))
        self.marks["optimiser hooks"] = len(torch_optimizer._global_optimizer_post_hooks)
        self.marks["masks on"] = len(layers_on(bridge))

    def assert_same(self, bridge) -> None:
        now = State(bridge)
        changed = {name: mark for name, mark in now.marks.items() if mark != self.marks[name]}
        assert not changed, changed
        for name, bits in self.values.items():
            assert torch.equal(now.values[name], bits), name


def ready(open_model, **options: Any):
    """A model whose flags are not all alike, with a gradient in place."""
    bridge = open_model("Llama", **options)
    bridge.blocks[0].requires_grad_(False)
    bridge.blocks[1].train()
    weight = named_weights(bridge)["blocks.1.mlp.in.weight"]
    weight.grad = torch.ones_like(weight)
    return bridge


# ---- An interrupt at every line


def interrupted(run: Callable[[], None], at: int = 0) -> list[str]:
    """Run it with a KeyboardInterrupt before the line of that number; 0 is none.

    Returns:
        The lines of `TRACED` and of the body, in the order in which they were executed.
    """
    lines = []

    def on_line(frame, event, _):
        if event == "line":
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(lines) == at:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame, *_):
        code = frame.f_code
        is_traced = code.co_filename in TRACED or code is run.__code__
        return on_line if is_traced else None

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        run()
    except KeyboardInterrupt:
        assert at
    finally:
        sys.settrace(previous)
    return lines


def first_times(lines: list[str]) -> list[int]:
    """The number at which each line is executed first."""
    numbers = {line: number for number, line in reversed(list(enumerate(lines, 1)))}
    return sorted(numbers.values())


def bodies(bridge) -> dict[str, Callable[[], None]]:
    first, second = a_mask(bridge, 0), a_mask(bridge, 1)
    requests = PromptSet.of(["how to use it ?"])
    batches = [random_batch(2)]

    def one_mask():
        with masked(bridge, first):
            pass

    def error():
        with contextlib.suppress(RuntimeError), masked(bridge, first, scale=-0.5):
            raise RuntimeError

    def nested():
        with masked(bridge, first), masked(bridge, second, scale=2.0), unmasked(bridge):
            pass

    def suspended(mask):
        with masked(bridge, mask):
            yield

    def other_order():
        outer, inner = suspended(first), suspended(second)
        next(outer)
        next(inner)
        outer.close()
        inner.close()

    def held():
        with masked(bridge, first, hold=True):
            pass

    def generated():
        with masked(bridge, first):
            generate(bridge, requests, max_new_tokens=2, template="raw")

    def full_tuning():
        options = {"lr": 1e-2, "objective": norm}
        with masked(bridge, first, hold=True), fine_tuning(bridge, batches, **options) as run:
            run.until(1)

    def low_rank():
        options = {"lr": 1e-2, "objective": norm, "lora": Lora(r=2)}
        with masked(bridge, first), fine_tuning(bridge, batches, **options) as run:
            run.until(1)

    return {
        "one mask": one_mask,
        "error": error,
        "nested": nested,
        "other order": other_order,
        "held": held,
        "full tuning": full_tuning,
        "low rank": low_rank,
        "generation": generated,
    }


def norm(bridge, batch) -> torch.Tensor:
    """An objective without a forward pass, which would take most of the time."""
    norms = [weight.float().square().mean() for weight in named_weights(bridge).values()]
    return torch.stack(norms).sum().expand(len(batch.tokens))


def leftovers(open_model, body: str, choose: Callable[[list[str]], list[int]]) -> dict:
    """What interrupts at the chosen lines of a body leave behind, by line."""

    def fresh():
        bridge = ready(open_model, vocab_size=320)
        run = bodies(bridge)[body]
        run()  # fills the caches
        return bridge, run, State(bridge)

    bridge, run, before = fresh()
    lines = interrupted(run)
    before.assert_same(bridge)

    left = {}
    numbers = choose(lines)
    for at in numbers:
        line = interrupted(run, at)[-1]
        try:
            before.assert_same(bridge)
        except AssertionError as error:
            left[at, line] = str(error)[:80]
            bridge, run, before = fresh()
    print(f"{body}: {len(numbers)} interrupts, {len(set(lines))} lines, {len(left)} left something")
    assert len(numbers) > 30
    return left


FAST = ("nested", "low rank")
SLOW = ("one mask", "error", "other order", "held", "full tuning", "generation")


@pytest.mark.parametrize("body", FAST)
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(open_model, body):
    left = leftovers(open_model, body, first_times)
    assert not left, left


@pytest.mark.slow
@pytest.mark.parametrize("body", FAST + SLOW)
def test_an_interrupt_at_any_line_each_time_it_is_executed(open_model, body):
    assert not leftovers(open_model, body, lambda lines: list(range(1, len(lines) + 1)))


# ---- What is done to the weights under a mask


def masked_values(bridge, mask) -> dict[str, torch.Tensor]:
    weights = named_weights(bridge)
    return {name: weight.detach()[mask.dense(name)].clone() for name, weight in weights.items()}


def assert_masked_values(bridge, mask, before, dtype=torch.float32) -> None:
    for name, values in masked_values(bridge, mask).items():
        assert torch.equal(values, before[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_that_is_cast_under_a_mask_comes_back_cast(llama, dtype):
    mask = a_mask(llama)
    before = masked_values(llama, mask)
    with masked(llama, mask, scale=0.0):
        llama.original_model.to(dtype)
    assert_masked_values(llama, mask, before, dtype)


def replace_parameters(bridge, change=lambda value: value) -> None:
    """Every parameter by another object, as `load_state_dict(assign=True)` and quantisers do."""
    for module in bridge.original_model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = change(parameter.detach().clone())
                is_float = value.is_floating_point()
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=is_float)


def test_replaced_parameters_get_what_was_under_the_mask(llama):
    mask = a_mask(llama)
    before, old = masked_values(llama, mask), named_weights(llama)
    with masked(llama, mask):
        replace_parameters(llama)
    assert named_weights(llama)["blocks.0.mlp.in.weight"] is not old["blocks.0.mlp.in.weight"]
    assert_masked_values(llama, mask, before)
    for name, weight in old.items():
        assert torch.equal(weight.detach()[mask.dense(name)], before[name]), "the old ones too"


def test_merged_weights_are_reported(llama):
    mask = a_mask(llama)
    before = masked_values(llama, mask)
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.attn\.q\.weight.*outside"),
        masked(llama, mask),
    ):
        replace_parameters(llama, lambda value: value + 0.5)
    assert_masked_values(llama, mask, before)


@pytest.mark.parametrize(
    "change", [lambda value: value.to(torch.int8), lambda value: value[:3]], ids=["int8", "shard"]
)
def test_weights_that_cannot_be_put_back_are_named(llama, change):
    mask, old = a_mask(llama), named_weights(llama)
    before = masked_values(llama, mask)
    with pytest.raises(ValueError, match=r"became.*again"), masked(llama, mask):
        replace_parameters(llama, change)
    for name, weight in old.items():
        assert torch.equal(weight.detach()[mask.dense(name)], before[name])


def test_another_checkpoint_copied_in_is_reported(open_model, llama):
    mask, other = a_mask(llama), open_model("Llama", seed=5)
    with pytest.raises(ValueError, match="load or merge"), masked(llama, mask):
        llama.original_model.load_state_dict(other.original_model.state_dict())
    assert not layers_on(llama)


def test_compatibility_mode_under_an_edit_is_reported(open_model):
    bridge = open_model("Llama")
    with (
        pytest.raises(ValueError, match="enable_compatibility_mode"),
        masked(bridge, a_mask(bridge)),
    ):
        bridge.enable_compatibility_mode()
    bridge = open_model("Llama")
    with (
        pytest.raises(ValueError, match="enable_compatibility_mode"),
        fine_tuning(bridge, [random_batch(2)], lr=1e-2),
    ):
        bridge.enable_compatibility_mode()


def test_an_error_of_the_body_is_kept_and_gets_the_report_as_a_note(llama):
    mask = a_mask(llama)
    with pytest.raises(RuntimeError, match="of the body") as caught, masked(llama, mask):
        replace_parameters(llama, lambda value: value + 0.5)
        raise RuntimeError("of the body")
    assert "were changed" in caught.value.__notes__[0]


def test_a_held_mask_reports_what_is_written_past_the_optimiser(llama):
    weight = named_weights(llama)["blocks.0.mlp.in.weight"]
    with pytest.raises(ValueError, match="changed"), masked(llama, a_mask(llama), hold=True):
        weight.data.fill_(1.0)


def test_a_second_thread_is_refused_and_changes_nothing(llama):
    mask = a_mask(llama)
    refusals = []

    def enter(context):
        try:
            with context:
                refusals.append("none")
        except ValueError as error:
            refusals.append(str(error))

    before = State(llama)
    with masked(llama, mask):
        during = State(llama)
        contexts = [
            masked(llama, mask),
            unmasked(llama),
            fine_tuning(llama, [random_batch()], lr=1),
        ]
        for context in contexts:
            thread = threading.Thread(target=enter, args=(context,))
            thread.start()
            thread.join()
            during.assert_same(llama)
    assert len(refusals) == 3
    assert all("thread" in refusal for refusal in refusals)
    before.assert_same(llama)


@pytest.mark.parametrize("n_interrupts", [1, 2, 3, 4])
def test_interrupts_in_a_row_leave_what_restore_or_the_next_mask_finishes(
    llama, monkeypatch, n_interrupts
):
    before, mask = State(llama), a_mask(llama)
    lift, n_left = Edit.lift, n_interrupts

    def interrupted_lift(edit):
        nonlocal n_left
        if n_left and edit.name == "blocks.1.attn.q.weight":
            n_left -= 1
            raise KeyboardInterrupt
        lift(edit)

    monkeypatch.setattr(Edit, "lift", interrupted_lift)
    with pytest.raises(KeyboardInterrupt), masked(llama, mask):
        pass
    assert len(layers_on(llama)) == (n_interrupts > 1)
    for _ in range(n_interrupts - 2):
        with pytest.raises(KeyboardInterrupt):
            restore(llama)
    if n_interrupts % 2:
        with masked(llama, mask):
            pass
    else:
        restore(llama)
    restore(llama)
    before.assert_same(llama)


def test_a_weight_that_torch_cannot_write_keeps_no_other_from_coming_back(llama, monkeypatch):
    before, mask = State(llama), a_mask(llama)
    lift = Edit.lift

    def failing_lift(edit):
        if edit.name == "blocks.0.attn.k.weight":
            raise RuntimeError("out of memory")
        lift(edit)

    with pytest.raises(RuntimeError) as caught, masked(llama, mask):
        monkeypatch.setattr(Edit, "lift", failing_lift)
    assert "blocks.0.attn.k.weight" in caught.value.__notes__[0]
    assert "restore" in caught.value.__notes__[0]
    monkeypatch.setattr(Edit, "lift", lift)
    restore(llama)
    before.assert_same(llama)


def test_factors_of_their_own_scale_each_weight(llama):
    before, mask = State(llama), a_mask(llama)
    values = masked_values(llama, mask)
    factors = {name: torch.rand(len(index)) for name, index in mask.removed.items()}
    with masked(llama, mask, scale=factors):
        for name, value in masked_values(llama, mask).items():
            assert torch.equal(value, values[name] * factors[name])
    before.assert_same(llama)
    factors["blocks.0.attn.q.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q\.weight"):
        masked(llama, mask, scale=factors).__enter__()
    before.assert_same(llama)


def test_a_real_signal_at_any_moment_leaves_the_model_as_it_was(llama, request):
    """An alarm, after a random time, in place of Ctrl-C."""
    mask, draw = a_mask(llama), random.Random(0)
    before = State(llama)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    n_hit = 0
    try:
        for _ in range(10 * request.config.getoption("sequences")):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 5e-3))
                with masked(llama, mask, hold=True):
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                n_hit += 1
            before.assert_same(llama)
    finally:
        signal.signal(signal.SIGALRM, previous)
    print(f"{n_hit} signals within the context")
    assert n_hit


# ---- Random sequences of edits


class Program:
    """Contexts of one model that are entered and left in any order, with what it must be like."""

    def __init__(self, bridge) -> None:
        self.bridge = bridge
        self.before = State(bridge)
        self.base = {name: w.detach().clone() for name, w in named_weights(bridge).items()}
        self.open: list[tuple[Any, Any, float, bool]] = []  # context, mask, scale, is it held

    def enter(self, mask, scale: float, hold: bool) -> None:
        context = masked(self.bridge, mask, scale=scale, hold=hold)
        context.__enter__()
        self.open.append((context, mask, scale, hold))

    def lift(self) -> None:
        context = unmasked(self.bridge)
        context.__enter__()
        self.open.append((context, None, 0.0, False))

    def leave(self, number: int, error: type[BaseException] | None) -> None:
        context = self.open.pop(number % len(self.open))[0]
        if error is None:
            context.__exit__(None, None, None)
        elif error is GeneratorExit:
            context.gen.close()
        else:
            raised = error()
            try:
                assert not context.__exit__(error, raised, None)
            except error as same:
                assert same is raised

    def expected(self) -> dict[str, torch.Tensor]:
        values = {name: value.clone() for name, value in self.base.items()}
        for number, (_, mask, scale, _) in enumerate(self.open):
            lower = [other for _, other, _, _ in self.open[:number] if other is not None]
            for name, value in values.items():
                if mask is not None:
                    gone = mask.dense(name)
                    value[gone] = value[gone] * scale if scale else 0.0
                for other in lower if mask is None else ():
                    value[other.dense(name)] = self.base[name][other.dense(name)]
        return values

    def check(self) -> None:
        for name, value in self.expected().items():
            # Training in float16 may end in NaN, which equals nothing.
            live = named_weights(self.bridge)[name].detach()
            assert torch.allclose(live, value, rtol=0, atol=0, equal_nan=True), name

    def train(self) -> None:
        """A step that decays every weight; held masks must stand, so all others are left first."""
        while not all(hold for *_, hold in self.open):
            self.leave(-1, None)
        weights = list(named_weights(self.bridge).values())
        grads = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.5).step()
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        for name, weight in named_weights(self.bridge).items():
            is_free = torch.ones_like(weight, dtype=torch.bool)
            for _, mask, _, _ in self.open:
                is_free &= ~mask.dense(name)
            self.base[name][is_free] = weight.detach()[is_free]


ERRORS = st.sampled_from([None, None, RuntimeError, KeyboardInterrupt, GeneratorExit])
SCALES = st.sampled_from([0.0, 0.0, -0.5, 3.0])
STEPS = st.one_of(
    st.tuples(st.just("enter"), st.integers(0, 5), SCALES, st.booleans()),
    st.tuples(st.just("lift")),
    st.tuples(st.just("leave"), st.integers(0, 9), ERRORS),
    st.tuples(st.just("tune"), st.booleans(), ERRORS),
    st.tuples(st.just("train")),
    st.tuples(st.just("generate")),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_sequence_of_edits_can_be_undone(open_model, dtype, request):
    bridge = ready(open_model, dtype=dtype, vocab_size=320)
    masks = [a_mask(bridge, seed, 0.3) for seed in range(6)]
    requests = PromptSet.of(["how to use it ?"])
    generate(bridge, requests, max_new_tokens=1, template="raw")  # TransformerLens sets its hooks
    start = State(bridge)

    @settings(
        max_examples=request.config.getoption("sequences"),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.lists(STEPS, min_size=3, max_size=12))
    def run(steps):
        program = Program(bridge)
        for step, *arguments in steps:
            if step == "enter":
                number, scale, hold = arguments
                program.enter(masks[number], scale, hold)
            elif step == "lift":
                program.lift()
            elif step == "leave" and program.open:
                program.leave(*arguments)
            elif step == "tune":
                low_rank, error = arguments
                lora = Lora(r=2) if low_rank else None
                options = {"lr": 1e-2, "objective": norm, "lora": lora}
                # In float16 earlier training may have ended in NaN, which fine_tuning refuses.
                refusals = [ValueError] if dtype == torch.float16 else []
                with (
                    contextlib.suppress(*refusals, *([error] if error else [])),
                    fine_tuning(bridge, [random_batch(2)], **options) as run,
                ):
                    run.until(1)
                    if error:
                        raise error
            elif step == "train":
                program.train()
            elif step == "generate":
                with contextlib.suppress(NotFiniteError):  # float16 may have been trained to NaN
                    generate(bridge, requests, max_new_tokens=1, template="raw")
            program.check()
        while program.open:
            program.leave(len(steps), None)
            program.check()

        # What training has moved goes back for the next sequence.
        with torch.no_grad():
            for name, weight in named_weights(bridge).items():
                weight.copy_(first[name])
        start.assert_same(bridge)

    first = {name: weight.detach().clone() for name, weight in named_weights(bridge).items()}
    run()
