"""What lies behind the names in a configuration: contents of prompts, weights and files of options, as digests."""

from bench import registry
from bench.models import catalogue
from bench.options import paths
from bench.prompts import PromptSet
from bench.runtime.digests import digest, digest_files
from bench.settings import RunConfig


def contents(config: RunConfig, prompts: PromptSet) -> dict[str, str]:
    """Digest by dotted setting; runs of equal configuration and equal contents are the same run.

    A reward whose weights are not here yet has none.
    """
    digests = {"prompts.name": prompts.digest}
    if folder := catalogue.locate(config.model.name, config.model.t5):
        digests["model.name"] = digest_files(folder)
    for section in ("method", "reward"):
        digests |= {f"{section}.{key}": digest_files(path) for key, path in paths(getattr(config, section))}
    needs = registry.load("rewards", config.reward.name).files
    if needs and not any(need.missing() for need in needs):
        digests["reward.name"] = digest([need.identity() for need in needs])
    return digests
