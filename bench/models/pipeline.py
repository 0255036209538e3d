"""What all families of latent text-to-image pipelines in diffusers' on-disk format share."""

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bench.errors import BenchError
from bench.model import Conditioning, DiffusionModel
from bench.models import emoji
from bench.models.layout import Rule, read
from bench.models.precision import network_dtype
from bench.sampling.kernel import Kernel
from bench.sampling.noise import seeded
from bench.settings import ModelConfig

ATTENTION = {"sdpa": AttnProcessor2_0, "eager": AttnProcessor, "sliced": lambda: SlicedAttnProcessor(slice_size=1)}
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

TEXTS = 256  # encoded prompts that are kept: FLUX's are 4 MB each

Parts = dict[str, Tensor]  # of a Conditioning
Shapes = tuple[tuple[int, ...], dict[str, tuple[int, ...]]]
Call = Callable[..., tuple[Tensor, ...]]  # a denoiser's forward, called with return_dict=False


class PipelineModel(DiffusionModel):
    """A diffusers pipeline with a finetuned part that can be switched off. A family is a subclass, one file each.

    folder: a local folder of the pipeline.
    guidance: classifier-free guidance scale, in sampling and in every loss; 1 means none. negative_prompt: what it
        leads away from.
    dtype: of the denoiser and the text encoders; adapters, latents, decoder and rewards stay float32. tf32: said of
        products that a GPU may round (`bench.models.precision.use_precision` lets it), for the fingerprint.
    finetune: "lora" (gaussian start, the family's targets; `lora_alpha`: the rank if None) or "full".
    checkpointing: keep only the inputs of denoiser and decoder for the backward pass and run them again there.
    attention: "sdpa" (torch's fused kernels), "eager" (plain matrix products) or "sliced" (those, a head at a time).
    compile: torch.compile the denoiser. vae_slicing: decode one image at a time.
    components: parts of the pipeline that are given, by the pipeline's names, instead of loaded.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]  # of the pipeline, and the classes that are read
    optional: ClassVar[frozenset[str]] = frozenset()  # of these, the ones that a pipeline may lack: T5's
    rules: ClassVar[Mapping[str, Rule]]  # what can be represented, by "part.key" of the configurations
    denoiser: ClassVar[str]  # the pipeline's name for it
    lora_targets: ClassVar[tuple[str, ...]]
    unused: ClassVar[Mapping[str, Any]] = {}  # options of from_pretrained that leave parts out
    embedded_guidance: ClassVar[bool] = False  # guidance is an input of the network, not a second row

    def __init__(
        self,
        folder: str | Path,
        *,
        guidance: float,
        dtype: torch.dtype = torch.float32,
        tf32: bool = False,
        device: torch.device | str = "cpu",
        finetune: str = "lora",
        lora_rank: int = 8,
        lora_alpha: int | None = None,
        checkpointing: bool = False,
        attention: str = "sdpa",
        compile: bool = False,
        vae_slicing: bool = False,
        negative_prompt: str = "",
        components: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        self.device, self.guidance, self.folder = torch.device(device), guidance, Path(folder)
        self.finetune, self.checkpointing, self.negative_prompt = finetune, checkpointing, negative_prompt
        self._lora_scale = (lora_alpha or lora_rank) / lora_rank
        self._components = dict(components or {})
        self.pipeline = pipe = self.open(dtype)
        self.network = network = getattr(pipe, self.denoiser)
        self.read_configs(pipe)
        self.latent_shape, shapes = self.shapes(network.config, pipe.vae.config)
        self.decoder_batch = self.decoder_rows(torch.zeros(1, *self.latent_shape), pipe.vae)
        self._text_width = shapes["text"][-1]
        parts = [self.denoiser, "vae", *(name for name in TEXT_ENCODERS if getattr(pipe, name, None) is not None)]
        self._fingerprint = _hash(pipe, parts, "tf32" if tf32 else dtype, negative_prompt)
        pipe.to(self.device)
        self._texts: dict[str, Conditioning] = {}
        self._prior: nn.Module | None = None
        if finetune == "full":
            self._prior = copy.deepcopy(network)
            network.to(torch.float32).requires_grad_(True)
        else:
            with seeded(seed, "lora"):
                lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha or lora_rank, init_lora_weights="gaussian")
                lora.target_modules = list(self.lora_targets)
                network.add_adapter(lora, ADAPTER)
        for parameter in self.adapters().values():
            parameter.data = parameter.data.float()
        self._dtype, self._prior_dtype = next(network.parameters()).dtype, dtype
        self._layers = {name: m for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
        self._replaced: dict[str, Tensor] = {}  # weights of the denoiser that stand in for its own
        self._merged = False  # whether they contain the adapters, which are then off
        self._mergeable = bool(self._layers) and self._dtype == torch.float32 and not compile
        if vae_slicing:
            pipe.vae.enable_slicing()
        for one in filter(None, (network, self._prior)):
            if attention != "sdpa":  # which is what every family has by itself
                one.set_attn_processor(ATTENTION[attention]())
            if compile:  # of forward alone: the hooks that count calls stay outside the compiled code
                one.forward = torch.compile(one.forward)

    @classmethod
    def create(
        cls, folder: Path | None, config: ModelConfig, *, guidance: float, device: torch.device | str, seed: int
    ) -> "PipelineModel":
        """See `DiffusionModel.create`."""
        settings = config.model_dump(exclude={"name", "dtype", "t5"}) | {"components": emoji.shared(folder)}
        if not config.t5:
            if not cls.optional:
                raise BenchError(f"model.t5 = false: {config.name!r} has no T5 encoder that could be left out.")
            settings["components"] |= dict.fromkeys(cls.optional)
        settings |= {"dtype": network_dtype(config, device), "tf32": config.dtype == "tf32"}
        return cls(folder, guidance=guidance, device=device, seed=seed, **settings)

    def open(self, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        """The pipeline as diffusers reads it from the folder, on the CPU; the decoder is in float32."""
        index = read(self.folder / "model_index.json")
        absent = {name: None for name, part in index.items() if part == [None, None]}  # has to be said once more
        pipe = self.pipeline_class.from_pretrained(
            self.folder,
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
            local_files_only=True,
            **absent | dict(self.unused) | self._components,
        )
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        return pipe

    # What a family says of itself ---------------------------------------------------------------------------------

    @abstractmethod
    def read_configs(self, pipe: DiffusionPipeline) -> None:
        """Set `output`, `spacing` and the schedule (see `DiffusionModel`) from the pipeline's configs."""

    @staticmethod
    @abstractmethod
    def shapes(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Shapes:
        """Of one row, from the configs of denoiser and autoencoder: of the latent, and of the conditioning's parts.

        The part "text" holds the text states, the width last.
        """

    @abstractmethod
    def encode_one(self, prompt: str) -> Parts:
        """The conditioning's parts for one prompt, [1, …] each, as the pipeline makes them."""

    @staticmethod
    @abstractmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """The network's output for latents [B, *latent] at times [B]; `call` is the denoiser, parts have its dtype."""

    @staticmethod
    def vae_latents(z: Tensor, vae: nn.Module) -> Tensor:
        """What the decoder takes in the place of latents [B, *latent]."""
        return z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)

    @classmethod
    def decoder_rows(cls, z: Tensor, vae: nn.Module) -> int:
        """`decoder_batch` for latents [1, *latent]: half a megapixel, at most 8 rows.

        On a CPU, pictures of 32 pixels 8 at a time take 0.9 of the time that 16 or 64 take.
        """
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        return min(8, max(1, 2**19 // (scale**2 * cls.vae_latents(z, vae)[0, 0].numel())))

    def pipeline_latents(self, z: Tensor) -> Tensor:
        """Latents [B, *latent] as the pipeline's own call takes them."""
        return z

    @classmethod
    def rows(cls, guidance: float) -> int:
        """See `DiffusionModel.rows`."""
        return 1 if guidance == 1 or cls.embedded_guidance else 2

    def with_guidance(self, guidance: float) -> "PipelineModel":
        """See `DiffusionModel.with_guidance`."""
        if guidance == self.guidance:
            return self
        other = copy.copy(self)
        other.guidance, other._texts = guidance, {}  # where guidance is an input, the texts hold it
        return other

    # The verbs ----------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A row a prompt; each prompt is encoded alone, and the last ones are kept."""
        for prompt in prompts:
            if prompt not in self._texts:
                with torch.no_grad():
                    self._texts[prompt] = Conditioning(self.encode_one(prompt))
            self._texts[prompt] = self._texts.pop(prompt)
        whole = Conditioning.join([self._texts[prompt] for prompt in prompts])
        for prompt in list(self._texts)[:-TEXTS]:
            del self._texts[prompt]
        return whole

    def unconditional(self) -> Conditioning:
        """The row that guidance starts from."""
        return self.encode([self.negative_prompt])

    def pipeline_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """Keywords of the pipeline's own call that give it these rows and this guidance."""
        names = {"prompt_embeds": "text", "pooled_prompt_embeds": "pooled"}
        inputs = {ours: conditioning.parts.get(part) for ours, part in names.items()}
        if self.rows(self.guidance) > 1:
            null = self.unconditional().expand(len(conditioning))
            inputs |= {f"negative_{ours}": null.parts.get(part) for ours, part in names.items()}
        return {"guidance_scale": self.guidance} | {name: given for name, given in inputs.items() if given is not None}

    def own_call(
        self, pipe: DiffusionPipeline, conditioning: Conditioning, z: Tensor, kernel: Kernel, output_type: str
    ) -> Any:
        """What the call of `pipe`, the model's or another of its folder, makes of start latents `z` [B, *latent].

        Same steps, guidance and, but for a flow's pipeline, which has none, η. output_type: as diffusers has it.
        """
        own = {}
        if self.output != "flow":
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
            own = {"eta": kernel.eta}
        z = z.to(self.device)
        height, width = (pipe.vae_scale_factor * side for side in self.vae_latents(z, self.pipeline.vae).shape[2:])
        own |= {"height": height, "width": width, "latents": self.pipeline_latents(z).to(self._dtype)}
        steps = {"num_inference_steps": kernel.steps, "output_type": output_type}
        return pipe(**self.pipeline_inputs(conditioning), **own, **steps).images

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
        return null_output + self.guidance * (output - null_output), output

    def _call(self, z: Tensor, t: Tensor, conditioning: Conditioning, prior: bool) -> Tensor:
        names, tensors = list(conditioning.parts), list(conditioning.parts.values())
        if self.checkpointing and torch.is_grad_enabled():
            # The adapter switch is inside the checkpointed function, so the recomputation runs the same network.
            again = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self._denoise, z, t, names, prior, self._replaced, self._merged, *tensors, **again)
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
        call: Call = network
        if replaced and not prior:
            call = partial(_call_with, network, replaced)
        with self._adapters_off() if prior or merged else nullcontext():
            return self.denoise(call, z.to(dtype), t, parts).float()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """See `DiffusionModel.merged`: `W + BA` in the place of W, of a float32 denoiser with LoRA.

        In 16 bits the sum would be rounded, and the replay of what was sampled would be another network's.
        """
        if not self._mergeable or self._replaced:
            yield
            return
        with torch.no_grad():
            whole = {
                f"{name}.base_layer.weight": layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
                for name, layer in self._layers.items()
            }
        self._merged = True
        try:
            with self.using(whole):
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

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        # The layers' own flag: diffusers' disable_adapters() would also clear requires_grad for good.
        for layer in self._layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer._disable_adapters = False

    def decode(self, z: Tensor) -> Tensor:
        """See `DiffusionModel.decode`; the decoder runs in float32."""
        z = self.vae_latents(z, self.pipeline.vae)
        if self.checkpointing and torch.is_grad_enabled() and z.requires_grad:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            return torch.cat([checkpoint(self._decode, row, **again) for row in z.split(1)])
        return self._decode(z)

    def _decode(self, z: Tensor) -> Tensor:
        return (self.pipeline.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def adapters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the denoiser by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`, which `load_lora_weights` reads; full: the denoiser's folder."""
        if self.finetune == "full":
            self.network.save_pretrained(folder / self.denoiser)
        else:
            state = get_peft_model_state_dict(self.network)
            # the scale goes into the file's weights, for a reader without our config takes alpha for the rank
            state = {n: (t * self._lora_scale if ".lora_B" in n else t).cpu() for n, t in state.items()}
            self.pipeline_class.save_lora_weights(folder, **{f"{self.denoiser}_lora_layers": state})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; raises FileNotFoundError or ValueError."""
        if self.finetune == "full":
            whole = type(self.network).from_pretrained(folder / self.denoiser, local_files_only=True)
            self.network.load_state_dict(whole.state_dict())
            return
        state = {
            name.removeprefix(f"{self.denoiser}."): tensor for name, tensor in load_file(folder / LORA_FILE).items()
        }
        own = get_peft_model_state_dict(self.network)
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError(f"{folder / LORA_FILE} does not fit this model's adapter (another model or lora_rank?)")
        state = {n: t / self._lora_scale if ".lora_B" in n else t for n, t in state.items()}
        set_peft_model_state_dict(self.network, state)

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """A small text-conditioned UNet; see `DiffusionModel.latent_network`."""
        return _LatentUNet(self.latent_shape, channels, layers_per_block, self._text_width)

    def fingerprint(self) -> str:
        """Hash of weights, scheduler, precision, guidance and negative prompt."""
        return hashlib.blake2b(f"{self._fingerprint} {self.guidance}".encode(), digest_size=16).hexdigest()


class _LatentUNet(nn.Module):
    """`(z, t, text) → [B, *latent]`, exactly zero at the start: weight and bias of the last layer are."""

    def __init__(self, latent_shape: tuple[int, ...], channels: Sequence[int], layers_per_block: int, text_dim: int):
        super().__init__()
        levels = len(channels)
        self.unet = UNet2DConditionModel(
            sample_size=latent_shape[-1],
            in_channels=latent_shape[0],
            out_channels=latent_shape[0],
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            cross_attention_dim=text_dim,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            norm_num_groups=min(32, channels[0]),
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(z, t, encoder_hidden_states=conditioning.parts["text"].float(), return_dict=False)[0]


def _call_with(network: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return functional_call(network, weights, args, kwargs)


def _hash(pipe: DiffusionPipeline, parts: Sequence[str], *settings: object) -> str:
    digest = hashlib.blake2b(repr((settings, sorted(pipe.scheduler.config.items(), key=str))).encode(), digest_size=16)
    for part in parts:
        for name, tensor in sorted(getattr(pipe, part).state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
