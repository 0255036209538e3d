"""What lies behind the names in a configuration: contents of prompts, weights and files of options, as digests."""

from collections.abc import Iterator
from pathlib import Path

from bench import registry
from bench.models import catalogue
from bench.options import Config
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
        digests |= {f"{section}.{key}": digest_files(path) for key, path in _paths(getattr(config, section))}
    needs = registry.load("rewards", config.reward.name).files
    if needs and not any(need.missing() for need in needs):
        digests["reward.name"] = digest([need.identity() for need in needs])
    return digests


def _paths(options: Config, prefix: str = "") -> Iterator[tuple[str, Path]]:
    for key, value in options:
        if isinstance(value, Config):
            yield from _paths(value, f"{prefix}{key}.")
        elif isinstance(value, Path):
            yield prefix + key, value
