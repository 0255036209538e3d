"""The least that a method's equations need of the denoiser, beside which `bench profile --all` puts what was measured.

A formula counts states, not calls: a prediction that two terms of a loss use is counted once, a vector-Jacobian
product of summed cotangents too, and nothing is counted for what the rollout has recorded. The rollout itself is
counted apart, for one round may serve several updates. Backward rows are those that a gradient enters: one pass for
parameters, and one for every cotangent that does not go with it. Recomputation (gradient checkpointing) is never
necessary.

A new method family adds one function and one line of `FORMULAS`; a method without one is shown without a comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.core import Core
from bench.method import Method
from bench.sampling.trajectory import Batch


@dataclass(frozen=True)
class Setting:
    """What the counts depend on.

    steps: K. rows: of one guided prediction, 2, or 1 without guidance.
    chosen: for every trajectory the steps whose transitions enter the loss, or the one where the gradient starts.
    """

    steps: int
    rows: int
    chosen: list[list[int]]


@dataclass(frozen=True)
class Rows:
    """Rows through the denoiser: of the rollout, and of the losses forward and backward."""

    rollout: int
    forward: int
    backward: int


def balance(config: Any, setting: Setting) -> Rows:
    """Detailed balance: the policy, and the prior if residual; `x̂` at z_k is the text half of the policy's prediction.

    Only the look-ahead of a z_{k+1} that is not chosen itself takes a row of its own, without guidance.
    """
    transitions = sum(map(len, setting.chosen))
    alone = sum(len({k + 1 for k in steps} - {setting.steps, *steps}) for steps in setting.chosen)
    counted = _rows(setting, transitions * (2 if config.residual else 1), transitions)
    return Rows(counted.rollout, counted.forward + alone, counted.backward)


def trajectory_balance(config: Any, setting: Setting) -> Rows:
    """Policy and prior at every state."""
    transitions = sum(map(len, setting.chosen))
    return _rows(setting, 2 * transitions, transitions)


def softmax_balance(config: Any, setting: Setting) -> Rows:
    """The policy at every state, and the prior, if it counts; a second pass of the policy only saves memory."""
    transitions = sum(map(len, setting.chosen))
    return _rows(setting, (2 if config.prior else 1) * transitions, transitions)


def preferences(config: Any, setting: Setting) -> Rows:
    """Policy and prior at a noised winner and loser."""
    states = 2 * sum(map(len, setting.chosen))
    return _rows(setting, 2 * states, states)


def value_gradient(config: Any, setting: Setting) -> Rows:
    """Policy and prior at every chosen state; a value's consistency asks for the policy ahead and the prior's Jacobian.

    The finished sample is scored as it is.
    """
    states = sum(map(len, setting.chosen))
    ahead = sum(len({k + 1 for k in steps} - {setting.steps, *steps}) for steps in setting.chosen)
    network = config.value_network and config.consistency
    return _rows(setting, 2 * states + (ahead if network else 0), states * (2 if network else 1))


def adjoint_matching(config: Any, setting: Setting) -> Rows:
    """The policy at chosen states; the prior's means down to the first of them, its Jacobian down to the one after."""
    transitions = sum(map(len, setting.chosen))
    prior = sum(setting.steps - min(steps) for steps in setting.chosen)
    return _rows(setting, transitions + prior, transitions + prior - len(setting.chosen))


def velocity_matching(config: Any, setting: Setting) -> Rows:
    """At every noised sample the policy, and each network that it is compared with; the policy alone learns."""
    states = sum(map(len, setting.chosen))
    others = {name for name, weight in config.anchors.items() if weight}
    others |= {"old"} if config.residual == "old" or config.weight == "likelihood" else set()
    return _rows(setting, states * (1 + len(others)), states)


FORMULAS: dict[str, Callable[[Any, Setting], Rows]] = {  # by the target of the plugin, so that presets share one
    "bench.methods.db:DB": balance,
    "bench.methods.velocity_matching:VelocityMatching": velocity_matching,
    "bench.methods.rtb:RTB": trajectory_balance,
    "bench.methods.rtb:SoftmaxRTB": softmax_balance,
    "bench.methods.online_dpo:OnlineDPO": preferences,
    "bench.methods.vgg_flow:VGGFlow": value_gradient,
    "bench.methods.adjoint_matching:AdjointMatching": adjoint_matching,
}


def necessary(target: str, core: Core, method: Method, batch: Batch) -> Rows | None:
    """The rows that one round of `method`, whose plugin has that target, needs; None where there is no formula.

    The random steps are those that the method itself would choose for the batch.
    """
    rows = core.model.rows(core.model.guidance)
    if nfe := method.nfe(core, batch):
        return Rows(rows * nfe.rollout, rows * nfe.forward + nfe.unguided, rows * nfe.backward)
    if target not in FORMULAS:
        return None
    return FORMULAS[target](method.config, Setting(core.kernel.steps, rows, _chosen(core, method, batch)))


def _chosen(core: Core, method: Method, batch: Batch) -> list[list[int]]:
    config = method.config
    if hasattr(method, "steps"):
        return method.steps(core, batch).tolist()
    if hasattr(config, "fraction"):
        return core.choose_steps(batch, config.fraction).tolist()
    return [list(range(core.kernel.steps))] * len(batch)


def _rows(setting: Setting, forward: int, backward: int, rollout: int | None = None) -> Rows:
    """Guided predictions as rows; without `rollout`, the whole chains of all trajectories."""
    predictions = setting.steps * len(setting.chosen) if rollout is None else rollout
    return Rows(*(setting.rows * count for count in (predictions, forward, backward)))
