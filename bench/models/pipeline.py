"""What all families of latent text-to-image pipelines in diffusers' on-disk format share."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bench.errors import BenchError
from bench.model import Conditioning
from bench.models.card import EmbeddedCard
from bench.models.cards import CARDS
from bench.models.family import Call
from bench.models.fingerprint import fingerprint
from bench.models.folder import read
from bench.models.lora import LORA_FILE, Adapters, LoraAdapter
from bench.models.precision import network_dtype
from bench.models.prompt_store import PromptStore
from bench.models.prompts import PRIOR, TEXT_ENCODER, PromptEncoder
from bench.models.quantized import quantize
from bench.models.sharded import shard
from bench.models.solver import set_solver
from bench.models.spec import PipelineSpec
from bench.runtime import processes
from bench.runtime.digests import digest
from bench.runtime.finite import require_finite_weights
from bench.sampling.kernel import Kernel
from bench.settings import ModelConfig

ATTENTION: dict[str, Callable[[], Any]] = {
    "eager": AttnProcessor,
    "sdpa": AttnProcessor2_0,
    "sliced": lambda: SlicedAttnProcessor(slice_size=1),
}
AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # of torch's checkpoint


class PipelineModel(PromptEncoder):
    """A diffusers pipeline whose denoiser is finetuned. A family is a subclass, one file each.

    folder: of the pipeline. config: the settings `model.…`. guidance: the scale of classifier-free guidance, in
    sampling and in every loss. seed: of the adapter's first values. components: parts of the pipeline that are given,
    by the pipeline's names, instead of loaded.
    Adapters, latents, decoder and rewards are float32 whatever the precision of the denoiser and the text encoders.
    """

    spec: PipelineSpec

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        guidance: float,
        device: torch.device | str = "cpu",
        seed: int = 0,
        components: Mapping[str, Any] | None = None,
    ):
        self.folder, self.config, self.guidance, self.device = folder, config, guidance, torch.device(device)
        self._components = dict(components or {})
        self._prior_dtype = dtype = network_dtype(config, device)
        index = read(folder / "model_index.json")
        encoders = [name for name, part in index.items() if name.startswith(TEXT_ENCODER) and part != [None, None]]
        deferred = [name for name in encoders if name not in self._components]
        if not config.offload or config.finetune == "none":  # what is judged may change the encoders
            deferred = []
        self._store = PromptStore(folder, index, deferred, dtype, self.device) if deferred else None
        self.pipeline: Any = self.open(dtype, without=deferred)
        pipe = self.pipeline
        self.network: Any = getattr(pipe, self.denoiser)
        network = self.network
        parts = {name: getattr(pipe, name).config for name in (self.denoiser, "vae", "scheduler")}
        parts |= {"pipeline": index, "picture": self.asked(config)}
        self.spec = spec = self.describe(parts)
        spec.require_guidance(guidance, folder)
        self.decoder_batch = self.decoder_rows(torch.zeros(1, *spec.latent_shape), pipe.vae)
        precision = "tf32" if config.dtype == "tf32" else str(dtype)
        absent = self._store.identities(self._load_encoders) if self._store else {}
        settings = {"precision": precision, "negative_prompt": config.negative_prompt}
        if config.quantize:  # others have the fingerprint that they had before there was a choice
            settings["quantize"] = config.quantize
        self._fingerprint = fingerprint(pipe, absent, **settings)
        self._texts = {}
        self._prior: nn.Module | None = None
        self._lora: Adapters | None = None
        self._encoders = ()
        if config.finetune == "lora":
            self._lora = LoraAdapter(network, config.lora, self.lora_targets, seed)
        if config.quantize:  # before the rest goes to the device, which may be too small for the weights in full
            quantize(network, config.quantize, self.device)
        self.sharded = config.shard and processes.count() > 1
        if self.sharded:  # before, too
            shard(network, self.device)
        self._place()
        if config.finetune == "full":
            self._prior = copy.deepcopy(network)
            network.to(torch.float32).requires_grad_(True)
        self._dtype = next(network.parameters()).dtype
        self._replaced: dict[str, Tensor] = {}  # weights of the denoiser that stand in for its own
        self._merged = False  # whether they contain the adapters, which are then off
        if config.vae_slicing:
            pipe.vae.enable_slicing()
        for one in filter(None, (network, self._prior)):
            self._execute(one)

    def _execute(self, network: Any) -> None:
        """Let a denoiser compute as the settings say."""
        if self.config.attention != "sdpa":  # which every family has by itself
            network.set_attn_processor(ATTENTION[self.config.attention]())
        if self.config.compile:  # of forward alone: the hooks that count calls stay outside the compiled code
            network.forward = torch.compile(network.forward)

    @classmethod
    def create(
        cls, folder: Path | None, config: ModelConfig, *, guidance: float, device: torch.device | str, seed: int
    ) -> "PipelineModel":
        """See `DiffusionModel.create`. Raises BenchError for a pipeline without T5 that is asked to leave it out."""
        if folder is None:
            raise BenchError(f"{config.name!r} is a family of pipelines: give a folder or a hub id of one.")
        card = CARDS.get(config.name)
        components = card.components() if isinstance(card, EmbeddedCard) else {}
        if not config.t5:
            if not cls.optional:
                raise BenchError(f"model.t5 = false: {config.name!r} has no T5 encoder that could be left out.")
            components = components | dict.fromkeys(cls.optional)
        return cls(folder, config, guidance=guidance, device=device, seed=seed, components=components)

    def _place(self) -> None:
        """Move the parts to the device; with `model.offload` neither text encoders nor the decoder's weights."""
        waiting = self.config.offload
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module) and not (waiting and name.startswith((TEXT_ENCODER, "vae"))):
                part.to(self.device)
        for module in self.pipeline.vae.modules() if waiting else ():
            for name, statistics in module.named_buffers(recurse=False):  # latents are scaled by them
                setattr(module, name, statistics.to(self.device))
            for parameter in module.parameters(recurse=False) if self.device.type == "cuda" else ():
                parameter.data = parameter.data.pin_memory()

    def adopt_adapters(self, denoiser: Adapters, encoders: Sequence[Adapters]) -> None:
        """Predict with adapters that others trained, already in the parts of the pipeline; off, they are the prior.

        encoders: those of the text encoders. The prior's prompts are then encoded apart, without them.
        """
        self._lora, self._encoders, self._texts = denoiser, encoders, {}

    def adopt_denoiser(self, network: nn.Module) -> None:
        """Predict with another denoiser of the same architecture; the pipeline's own is the prior."""
        self._prior, self.network = self.network, network.to(self.device, self._dtype).requires_grad_(False).eval()
        setattr(self.pipeline, self.denoiser, self.network)
        self._execute(self.network)

    def with_guidance(self, guidance: float) -> "PipelineModel":
        """See `DiffusionModel.with_guidance`."""
        if guidance == self.guidance:
            return self
        other = copy.copy(self)
        other.guidance, other._texts = guidance, {}  # where guidance is an input, the texts hold it
        return other

    @property
    def precision(self) -> torch.dtype:
        """Of the denoiser."""
        return self._dtype

    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        vae = self.pipeline.vae
        height, width = self.vae_latents(torch.zeros(1, *self.latent_shape, device=self.device), vae).shape[-2:]
        return height * self.pixels(vae.config), width * self.pixels(vae.config)

    def call_pipeline(self, pipe: Any, conditioning: Conditioning, z: Tensor, kernel: Kernel, output_type: str) -> Any:
        """What diffusers' own call of `pipe`, the model's or another of its folder, makes of latents `z` [B, *latent].

        Steps and guidance are the kernel's and the model's; so is η, except that flow pipelines have none. A pipeline
        whose scheduler is another solver than the kernel gets DDIM, or Euler's method on the kernel's grid.
        output_type: see diffusers.
        """
        options = set_solver(pipe, kernel, flow=self.output == "flow")
        z = z.to(self.device)
        if self.config.offload:  # it knows nothing of parts that wait elsewhere
            pipe.to(self.device)
        height, width = self.picture_size()
        options |= {"height": height, "width": width, "latents": self.pipeline_latents(z).to(self._dtype)}
        options |= {"num_inference_steps": kernel.steps, "output_type": output_type, **self.call_options}
        return pipe(**self.pipeline_inputs(conditioning), **options, return_dict=False)[0]

    def predict(
        self, z: Tensor, t: Tensor, conditioning: Conditioning, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """See `DiffusionModel.predict`."""
        if guided:
            return self._guided(z, t, conditioning, prior)[0]
        return self._call(z, t.expand(len(z)), conditioning, prior)

    def predict_both(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """See `DiffusionModel.predict_both`."""
        return self._guided(z, t, conditioning, prior=False)

    def _guided(self, z: Tensor, t: Tensor, conditioning: Conditioning, prior: bool) -> tuple[Tensor, Tensor]:
        """`o_∅ + w (o_c − o_∅)` in one call of doubled batch, and `o_c`."""
        t = t.expand(len(z))
        if self.rows(self.guidance) == 1:
            output = self._call(z, t, conditioning, prior)
            return output, output
        conditioning = Conditioning.join([self.unconditional().expand(len(z)), conditioning])
        null_output, output = self._call(torch.cat([z, z]), torch.cat([t, t]), conditioning, prior).chunk(2)
        return self.guide(null_output, output, self.guidance), output

    def _call(self, z: Tensor, t: Tensor, conditioning: Conditioning, prior: bool) -> Tensor:
        names, tensors = list(conditioning.parts), list(conditioning.parts.values())
        if self.config.checkpointing and torch.is_grad_enabled():
            # The adapter switch is inside the checkpointed function, so the recomputation runs the same network.
            return checkpoint(self._denoise, z, t, names, prior, self._replaced, self._merged, *tensors, **AGAIN)
        return self._denoise(z, t, names, prior, self._replaced, self._merged, *tensors)

    def _denoise(
        self,
        z: Tensor,
        t: Tensor,
        names: list[str],
        prior: bool,
        replaced: dict[str, Tensor],
        merged: bool,
        *tensors: Tensor,
    ) -> Tensor:
        network, dtype = (self._prior, self._prior_dtype) if prior and self._prior else (self.network, self._dtype)
        parts = {name: tensor.to(dtype) for name, tensor in zip(names, tensors, strict=True)}
        before = {name.removeprefix(PRIOR): parts.pop(name) for name in names if name.startswith(PRIOR)}
        if prior:
            parts |= before
        call: Call = network
        if replaced and not prior:
            call = partial(_call_with, network, replaced)
        with self._lora.off() if self._lora and (prior or merged) else nullcontext():
            return self.denoise(call, z.to(dtype), t, parts).float()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """See `DiffusionModel.merged`: `W + BA` in the place of W, of a float32 denoiser with LoRA.

        In 16 bits the sum would be rounded, and losses would see another network than the rollouts did.
        """
        exact = self._dtype == torch.float32 and not (self.config.compile or self.config.quantize or self.sharded)
        if not (self._lora and self._lora.mergeable and exact) or self._replaced:
            yield
            return
        self._merged = True
        try:
            with self.using(self._lora.merged_weights()):
                yield
        finally:
            self._merged = False

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """See `DiffusionModel.using`; the rest of the denoiser is shared."""
        before, self._replaced = self._replaced, dict(weights)
        try:
            yield
        finally:
            self._replaced = before

    def decode(self, z: Tensor) -> Tensor:
        """See `DiffusionModel.decode`; the decoder runs in float32."""
        z = self.vae_latents(z, self.pipeline.vae)
        if self.config.checkpointing and torch.is_grad_enabled() and z.requires_grad:
            return torch.cat([checkpoint(self._decode, row, **AGAIN) for row in z.split(1)])
        return self._decode(z)

    def _decode(self, z: Tensor) -> Tensor:
        decoder = _Decoder(self.pipeline.vae)
        if self.config.offload:  # copies of the weights, which a graph keeps as long as it needs them
            weights = decoder.named_parameters()
            here = {name: weight.to(self.device, non_blocking=True) for name, weight in weights}
            pixels = functional_call(decoder, here, z)
        else:
            pixels = decoder(z)
        images = (pixels / 2 + 0.5).clamp(0, 1)
        if images.dim() == 4:
            return images
        return images[:, :, 0] if images.shape[2] == 1 else images.transpose(1, 2)

    def adapters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the denoiser by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`, which `load_lora_weights` reads; full: the denoiser's folder."""
        if isinstance(self._lora, LoraAdapter):
            layers = {f"{self.denoiser}_lora_layers": self._lora.state()}
            self.pipeline_class.save_lora_weights(folder, **layers)
        else:
            self.network.save_pretrained(folder / self.denoiser)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises FileNotFoundError, ValueError, or BenchError if it is not finite."""
        if not isinstance(self._lora, LoraAdapter):
            whole = type(self.network).from_pretrained(folder / self.denoiser, local_files_only=True)
            require_finite_weights(whole.state_dict().items(), folder / self.denoiser)
            self.network.load_state_dict(whole.state_dict())
            return
        state = load_file(folder / LORA_FILE)
        require_finite_weights(state.items(), folder / LORA_FILE)
        try:
            self._lora.load_state({n.removeprefix(f"{self.denoiser}."): tensor for n, tensor in state.items()})
        except ValueError as error:
            raise ValueError(f"{folder / LORA_FILE}: {error}") from None

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """See `PipelineSpec.latent_network`."""
        return self.spec.latent_network(channels, layers_per_block)

    def fingerprint(self) -> str:
        """See `bench.models.fingerprint`; with the guidance, and with the size where it is chosen."""
        asked = {"latents": list(self.latent_shape)} if self.default_size else {}  # which no file says
        return digest({"pipeline": self._fingerprint, "guidance": float(self.guidance)} | asked)


class _Decoder(nn.Module):
    """An autoencoder whose forward pass is that of its decoder."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, return_dict=False)[0]


def _call_with(network: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return functional_call(network, weights, args, kwargs)
