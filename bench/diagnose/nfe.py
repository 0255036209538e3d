"""A method's NFE as rows through the denoiser, beside which `bench profile --all` puts what it measured."""

from dataclasses import dataclass

from bench.core import Core
from bench.method import Method
from bench.sampling.trajectory import Batch


@dataclass(frozen=True)
class Rows:
    """Rows through the denoiser: of the rollout, and of the losses forward and backward.

    A guided prediction is two rows, and one without guidance. Backward rows are those that a gradient enters: one pass
    for parameters, and one for every cotangent that does not go with it.
    """

    rollout: int
    forward: int
    backward: int


def required_rows(core: Core, method: Method, batch: Batch) -> Rows | None:
    """What one round on `batch` needs at the least, by `Method.nfe`; None where the method does not say."""
    rows = core.model.rows(core.model.guidance)
    if not (nfe := method.nfe(core, batch)):
        return None
    return Rows(rows * nfe.rollout, rows * nfe.forward + nfe.unguided, rows * nfe.backward)
