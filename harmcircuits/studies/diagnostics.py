"""Whether scores can be trusted: yield of verified answers, their loss, and its gradient's norm."""

from collections.abc import Mapping

from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.behaviours.model import Model
from harmcircuits.hooks.attribution import gradient_norm
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.measurements import Labels, Measurement, Rows

SATURATED_NLL = 0.02  # nats per token, below which first-order scores are noise


def diagnostics(
    model: Model,
    calibrations: Mapping[str, Calibration],
    labels: Labels,
    *,
    n_examples: int | None = None,
    max_memory: int | None = None,
) -> Rows:
    """Rows for the calibration data of every behaviour, labelled `behaviour`."""
    rows = Rows()
    for name, data in calibrations.items():
        # The loss of every example, but the gradient of a few: a norm costs a backward pass.
        batches = data.batches
        if n_examples is not None:
            n_batches = max(1, n_examples // model.batch_size)
            batches = batches[:n_batches]
        objective = model.behaviours[name].objective
        nll = completion_nll(model.bridge, data.batches).mean().item()
        norm = gradient_norm(model.bridge, batches, objective, max_memory=max_memory)
        figures = {
            "calibration_yield": data.n_verified / data.n_asked,
            "calibration_examples": data.n_verified,
            "calibration_nll": nll,
            "gradient_norm": norm,
        }
        where = {**labels, "behaviour": name}
        for metric, value in figures.items():
            rows += [Measurement.exact(metric, where, value)]
    return rows
