"""The command that trains with the settings of a row."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from bench import config
from bench.renames import current
from bench.reporting.rows import FINGERPRINT
from bench.runs.rows import comparable_settings


def command(settings: Mapping[str, Any], updates: int = 0) -> str:
    """`bench run …` with a row's settings by dotted key, as far as they are not this version's anyway.

    updates: how many to make instead of the row's; of a method that trains nothing 0. Updates and learning rate are
    always there. Raises BenchError if this version knows a setting no longer.
    """
    wanted = current(settings) | ({"train.updates": updates} if updates else {})
    wanted.pop(FINGERPRINT, None)
    wanted = comparable_settings(config.from_settings(wanted, []))
    method, reward, model = (wanted[f"{section}.name"] for section in ("method", "reward", "model"))
    natural = comparable_settings(config.resolve(method, reward=reward, overrides={"model.name": model}))
    words = ["bench", "run", method, "--model", model, "--reward", reward]
    options = {"prompts.name": "--prompts", "train.updates": "--updates"}
    for key, value in wanted.items():
        if value != natural.get(key) or (updates and key in ("train.updates", "optimizer.lr")):
            text = yaml.safe_dump(value, default_flow_style=True, width=1e9).removesuffix("\n...\n").strip()
            words += [options[key], str(value)] if key in options else ["--set", f"{key}={text}"]
    return shlex.join(words)
