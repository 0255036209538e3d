"""From what is judged to a run of the method "judged": its settings, its folder, its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import config as configs
from bench.errors import BenchError
from bench.models import catalogue
from bench.models.elsewhere.sources import Source, digest
from bench.options import leaves
from bench.settings import JUDGED, RunConfig

COSTS = {"nfe": int, "reward_calls": int, "gpu_hours": float}


def stated_cost(text: str | None) -> dict[str, int | float]:
    """`nfe=1.6e6,reward_calls=20000,gpu_hours=12`, any of them. Raises BenchError."""
    cost: dict[str, int | float] = {}
    for part in (text or "").split(",") if text else ():
        key, _, value = part.partition("=")
        try:
            cost[key.strip()] = COSTS[key.strip()](float(value))
        except (KeyError, ValueError, OverflowError):
            raise BenchError(
                f"--cost {part!r}: it takes {', '.join(COSTS)} with a number each, nfe=1.6e6,gpu_hours=12 for example."
            ) from None
    return cost


def configured(
    sources: Sequence[Source],
    scales: Sequence[float],
    *,
    named: Mapping[str, Any],
    label: str | None = None,
    cost: Mapping[str, int | float] | None = None,
    reward: str | None = None,
    suite: str | None = None,
    assignments: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> RunConfig:
    """The configuration that measures sources as one model, each adapter times its scale.

    named: settings of options by dotted key. An adapter that a run of this suite wrote, alone and at scale 1, brings
    the run's model, and what else is not said otherwise. Raises BenchError for what cannot be judged together.
    """
    if len(sources) > 1 and any(source.whole for source in sources):
        raise BenchError(f"{next(one.name for one in sources if one.whole)} holds whole weights, which do not add up.")
    if sources[0].whole and list(scales) != [1.0]:
        raise BenchError(f"{sources[0].name} holds whole weights: a scale is of adapters alone.")
    parts = [
        source.label if scale == 1 else f"{scale:g}*{source.label}"
        for source, scale in zip(sources, scales, strict=True)
    ]
    judged = {
        "method.label": label or "+".join(parts),
        "method.sources": [source.name for source in sources],
        "method.scales": list(scales),
        "method.digest": digest(sources),
        **{f"method.cost.{key}": value for key, value in (cost or {}).items()},
    }
    overrides: dict[str, Any] = {"model.finetune": "none", "model.quantize": None}
    if sources[0].config:
        run = configs.read(sources[0].config)
        if named.get("model.name", run.model.name) != run.model.name:
            raise BenchError(f"{sources[0].name} was trained on {run.model.name!r}: leave out --model.")
        as_in_run = len(sources) == 1 and list(scales) == [1.0]
        if not (reward or suite):
            changed: dict[str, Any] = {"method": {"name": JUDGED}, "optimizer.networks": {}} | judged | dict(named)
            changed |= {"evaluation.weights": "policy", "evaluation.at": [], "train.max_path_kl": None}
            changed |= {} if as_in_run else overrides
            return configs.with_metrics(configs.with_settings(run, changed, assignments), metrics)
        overrides = dict(leaves({"model": run.model.model_dump(mode="json")})) | ({} if as_in_run else overrides)
    return configs.resolve(
        JUDGED,
        reward=reward,
        suite=suite,
        overrides=overrides | dict(named) | judged,
        assignments=list(assignments),
        metrics=metrics,
    )


def without_noise(config: RunConfig) -> RunConfig:
    """The same on the sampler of most authors, the model's ODE. Its files must be here."""
    ((model, _),) = catalogue.check(config.model, [config.evaluation_sampler()])
    ode = {"evaluation.sampler.eta": 0.0, "evaluation.sampler.rule": "ddim"}
    if model.spec.output == "flow":
        ode["evaluation.sampler.final_noise"] = 0.0
    return configs.with_settings(config, ode)


def sampler_text(config: RunConfig) -> str:
    """A sentence on what drew the samples."""
    sampler = config.evaluation_sampler()
    how = f"{sampler.steps} steps of {sampler.rule}, guidance {sampler.guidance:g}"
    if sampler.eta:
        return f"Sampled by the suite's sampler, with noise: {how}, η = {sampler.eta:g}."
    return f"Sampled without noise, as most authors do: {how}. Metrics that need transition densities have no value."


def grouped(
    sources: Sequence[Source], scales: Sequence[float], together: bool
) -> list[tuple[Sequence[Source], Sequence[float]]]:
    """What is judged as one model, with its scales: every source by itself, or all together.

    scales: none, one for all, or one for each. Raises BenchError for another number of them.
    """
    if len(scales) not in (0, 1, len(sources)):
        raise BenchError(f"--scale is given {len(scales)} times for {len(sources)} sources: once for all, or for each.")
    every = list(scales) if len(scales) == len(sources) else [*(scales or [1.0])] * len(sources)
    if together:
        return [(sources, every)]
    return [([source], [scale]) for source, scale in zip(sources, every, strict=True)]
