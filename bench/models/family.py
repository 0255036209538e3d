"""What a family of pipelines says of itself. Nothing here needs weights."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import BenchError
from bench.model import DiffusionModel
from bench.models.rules import Configs, Rule
from bench.models.spec import PipelineSpec
from bench.sampling.noise import upload
from bench.settings import ModelConfig

Parts = dict[str, Tensor]  # of a Conditioning
Call = Callable[..., tuple[Tensor, ...]]  # a denoiser's forward, called with return_dict=False


class Family(DiffusionModel):
    """A family of diffusers pipelines: which it reads, what their configurations mean, how the denoiser is called.

    pipeline_class: of diffusers. parts: of the pipeline, with the classes that can be read. optional: of these, the
    ones that a pipeline may lack. unused: options of `from_pretrained` that leave further parts out.
    rules: what can be represented, by "part.key" of the configurations.
    denoiser: the pipeline's name for it. lora_targets: ends of the names of its layers that get an adapter.
    embedded_guidance: guidance is an input of the network, not a second row.
    host: parts of a Conditioning that lie on the CPU, as the denoiser's Python code asks for their values.
    default_size: height and width in pixels of a pipeline whose configurations name none; None: they do.
    video: whether it draws several frames.
    alone: whether diffusers reads a single file of its denoiser alone, which `bench convert` then takes.
    waits: how often a call of the denoiser waits for a GPU, in code of diffusers.
    call_options: further arguments of the pipeline's own call, where its defaults are not what is sampled here.
    """

    pipeline_class: ClassVar[Any]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[frozenset[str]] = frozenset()
    unused: ClassVar[Mapping[str, Any]] = {}
    rules: ClassVar[Mapping[str, Rule]]
    denoiser: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    embedded_guidance: ClassVar[bool] = False
    host: ClassVar[frozenset[str]] = frozenset()
    default_size: ClassVar[tuple[int, int] | None] = None
    video: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    waits: ClassVar[int] = 0
    call_options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    @abstractmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The pipeline's spec, from the configurations of its denoiser, autoencoder and scheduler.

        Beside these: its index as "pipeline", and what is asked for (see `asked`) as "picture".
        """

    @classmethod
    def asked(cls, config: ModelConfig) -> dict[str, Any]:
        """Height and width (both None where the files say them), and frames. Raises BenchError for what cannot be."""
        name = cls.pipeline_class.__name__
        if config.size and cls.default_size is None:
            raise BenchError(f"model.size: the files of a {name} say how large its pictures are; leave it out.")
        if config.frames > 1 and not cls.video:
            raise BenchError(f"model.frames = {config.frames}: a {name} draws pictures; use 1.")
        height, width = config.size or cls.default_size or (None, None)
        return {"height": height, "width": width, "frames": config.frames}

    @abstractmethod
    def encode_one(self, prompt: str) -> Parts:
        """The conditioning's parts for one prompt, [1, …] each, as the pipeline makes them."""

    def encode_null(self, prompt: str) -> Parts:
        """The parts of the empty or the negative prompt, which guidance starts from."""
        return self.encode_one(prompt)

    @staticmethod
    @abstractmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """The network's output for latents [B, *latent] at times [B]. call: the denoiser; parts have its dtype."""

    @classmethod
    def rows(cls, guidance: float) -> int:
        """See `DiffusionModel.rows`."""
        return 1 if guidance == 1 or cls.embedded_guidance else 2

    @classmethod
    def blank(cls, spec: PipelineSpec, dtype: torch.dtype = torch.float32) -> Parts:
        """One row of a Conditioning without storage; its parts on the CPU are ones."""
        places = {name: "cpu" if name in cls.host else "meta" for name in spec.conditioning}
        return {name: torch.ones(1, *spec.conditioning[name], dtype=dtype, device=places[name]) for name in places}

    @staticmethod
    def guide(null: Tensor, output: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of the network's outputs [B, *latent] for the empty prompt and for the rows'."""
        return null + scale * (output - null)

    @staticmethod
    def call_guidance(scale: float) -> dict[str, Any]:
        """The guidance scale as the pipeline's own call takes it."""
        return {"guidance_scale": scale}

    @staticmethod
    def pixels(vae: Mapping[str, Any]) -> int:
        """Pixels to a side of one of the autoencoder's latents, from its configuration."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    @staticmethod
    def vae_latents(z: Tensor, vae: Any) -> Tensor:
        """The decoder's input for latents [B, *latent]."""
        return z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)

    @classmethod
    def decoder_rows(cls, z: Tensor, vae: Any) -> int:
        """`decoder_batch` for latents [1, *latent]: half a megapixel, at most 8 rows.

        On a CPU, pictures of 32 pixels 8 at a time take 0.9 of the time that 16 or 64 take.
        """
        return min(8, max(1, 2**19 // (cls.pixels(vae.config) ** 2 * cls.vae_latents(z, vae)[0, 0].numel())))

    @classmethod
    def call_texts(cls, parts: Parts) -> dict[str, Any]:
        """The conditioning as the pipeline's own call takes it; the null prompt's keywords begin with `negative_`."""
        names = {"prompt_embeds": "text", "pooled_prompt_embeds": "pooled"}
        return {keyword: parts[part] for keyword, part in names.items() if part in parts}

    def pipeline_latents(self, z: Tensor) -> Tensor:
        """Latents [B, *latent] in the form that the pipeline's own call takes."""
        return z


def padded(text: Tensor, tokens: int) -> Parts:
    """Text states [1, n, width] with zeros behind them, and their mask [1, tokens]: 1 for a token, 0 for padding."""
    behind = (0, tokens - text.shape[1])
    return {
        "text": functional.pad(text, (0, 0, *behind)),
        "mask": functional.pad(torch.ones_like(text[..., 0]), behind),
    }


def standardised(z: Tensor, vae: Any) -> Tensor:
    """The decoder's input for a flow's latents [B, C, F, H, W], of the mean and variance of each channel."""
    mean, std = (
        upload(torch.tensor(vae.config[name]), z.device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return z / (1 / std) + mean  # rounded as in diffusers


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A pipeline of networks without storage: enough to check settings against it and to estimate memory.

    networks: by the pipeline's names.
    """

    family: type[Family]
    networks: Mapping[str, Any]
    spec: PipelineSpec

    @property
    def network(self) -> Any:
        """The denoiser."""
        return self.networks[self.family.denoiser]

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """See `DiffusionModel.latent_network`; without storage."""
        with torch.device("meta"):
            return self.spec.latent_network(channels, layers_per_block)
