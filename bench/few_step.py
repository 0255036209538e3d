"""What a few-step student is: a model that was distilled to a few sampling steps."""

from dataclasses import dataclass

from bench.errors import BenchError
from bench.settings import SamplerConfig, Spacing


@dataclass(frozen=True, kw_only=True)
class FewStep:
    """What a few-step student was distilled to. From a state it predicts where the path is at the next noise level.

    So its output is no mean `E[· | z]`, it means something at the levels of its grid alone, and the first noise decides
    most of the sample, whatever noise its steps add (see `bench.method.Needs`).

    steps: the numbers of sampling steps that it knows. spacing: their time grid; None: whichever is its own.
    teacher: the name of the model that it was distilled from, and the guidance and a grid of noise levels to compare
    the two at; None: it is not here.
    """

    steps: tuple[int, ...]
    spacing: Spacing | None = None
    teacher: tuple[str, SamplerConfig] | None = None

    def require(self, name: str, sampler: SamplerConfig) -> None:
        """Raise BenchError for a sampler that the student of this name does not know."""
        wanted = {"steps": self.steps, "guidance": (1,), "spacing": (self.spacing or sampler.spacing,)}
        for key, known in wanted.items():
            if (value := getattr(sampler, key)) not in known:
                raise BenchError(
                    f"sampler.{key} = {value}: {name!r} was distilled to few steps and knows no other than "
                    f"sampler.{key}={' or '.join(map(str, known))}."
                )
