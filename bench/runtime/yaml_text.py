"""YAML as it is written: every file and `--set` value is read by `parse`, and what is stored for it is `dump`ed."""

import copy
import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Of YAML 1.1's readings, 010 as 8, 1:30 as 90, dates and yes as true are left out; no key stands twice."""

    yaml_implicit_resolvers: dict = {}

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """As a string. Raises ValueError for half a character, which an escape can spell and nothing can encode."""
        text = super().construct_scalar(node)
        text.encode()
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As a dict, which would keep the last of equal keys."""
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            keys |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read as the string that it is."""

    yaml_implicit_resolvers = {
        first: [*_Loader.yaml_implicit_resolvers.get(first, []), *others]
        for first, others in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quoted = set(text) & set("\x85\u2028\u2029")  # line breaks, which the plain styles would fold into spaces
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_str)


def parse(text: str) -> Any:
    """What a YAML text says. Raises ValueError, with the reason and the line, where it cannot be read."""
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=256)  # every run of a sweep reads the same suite
def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text.strip() else ""
        raise ValueError(f"{error.problem}{line}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def dump(tree: Any) -> str:
    """The text of nested dicts, lists and scalars, in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
