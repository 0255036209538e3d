"""What a setting needs from elsewhere: weights of the model, the rewards and the feature spaces, and prompts."""

from bench import prompts, registry
from bench.evaluation.features import find_space
from bench.hub import Requirement
from bench.models import catalogue
from bench.settings import RunConfig


def requirements(config: RunConfig) -> list[Requirement]:
    """Everything that must be present before the run starts, each once. Raises BenchError for an unknown name."""
    needs = [*training_requirements(config), prompts.HUB.get(config.prompts.name)]
    for name in config.evaluation.rewards:
        needs += registry.load("rewards", name).files
    for space in feature_spaces(config):
        needs += find_space(space).files
    return list(dict.fromkeys(need for need in needs if need))


def training_requirements(config: RunConfig) -> list[Requirement]:
    """The weights among them that training itself needs: the model's and the trained reward's."""
    model = catalogue.repository(config.model.name, config.model.t5)
    return [*([model] if model else []), *registry.load("rewards", config.reward.name).files]


def feature_spaces(config: RunConfig) -> list[str]:
    """The feature spaces that the evaluation's metrics use, each once."""
    spaces = [registry.load("metrics", name).space for name in config.evaluation.metrics]
    return list(dict.fromkeys([config.evaluation.features, *(space for space in spaces if space)]))
