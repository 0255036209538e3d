"""Stable-Diffusion-style pipelines in diffusers' on-disk format, the embedded prior among them."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bench.models.base import DiffusionModel
from bench.sampling.noise import seeded

ATTENTION = {"sdpa": AttnProcessor2_0, "eager": AttnProcessor, "sliced": lambda: SlicedAttnProcessor(slice_size=1)}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for


class LatentDiffusion(DiffusionModel):
    """A `StableDiffusionPipeline` (epsilon or v-prediction) with a finetuned part that can be switched off.

    folder: a local folder or the id of a downloaded hub repository.
    guidance: classifier-free guidance scale, in sampling and in every loss; 1 means none.
    dtype: of the denoiser and the text encoder; adapters, latents, decoder and rewards stay float32.
    finetune: "lora" (rank = alpha = `lora_rank`, gaussian start, attention projections) or "full".
    checkpointing: keep only the inputs of denoiser and decoder for the backward pass and run them again there.
    attention: "sdpa" (torch's fused kernels), "eager" (plain matrix products) or "sliced" (those, a head at a time).
    compile: torch.compile the denoiser. vae_slicing: decode one image at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        guidance: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        finetune: str = "lora",
        lora_rank: int = 8,
        checkpointing: bool = False,
        attention: str = "sdpa",
        compile: bool = False,
        vae_slicing: bool = False,
        seed: int = 0,
    ):
        self.device, self.guidance = torch.device(device), guidance
        self.finetune, self.checkpointing = finetune, checkpointing
        pipe = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype={"default": dtype, "vae": torch.float32},
            safety_checker=None,
            requires_safety_checker=False,
            feature_extractor=None,
            use_safetensors=True,
            local_files_only=True,
        )
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.alphas_cumprod, self.final_alpha = scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod)
        self.steps_offset = scheduler.config.steps_offset
        self._levels = self.alphas_cumprod.to(self.device)
        self._v_prediction = scheduler.config.prediction_type == "v_prediction"
        self._fingerprint = _hash(pipe, guidance, dtype)
        pipe.to(self.device)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.requires_grad_(False).eval()
        self.pipeline, self.network = pipe, pipe.unet
        size = pipe.unet.config.sample_size
        self.latent_shape = (pipe.unet.config.in_channels, size, size)
        self._texts: dict[str, Tensor] = {}
        self._prior: UNet2DConditionModel | None = None
        if finetune == "full":
            self._prior = copy.deepcopy(pipe.unet)
            pipe.unet.to(torch.float32).requires_grad_(True)
        else:
            with seeded(seed, "lora"):
                lora = LoraConfig(r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian")
                lora.target_modules = LORA_TARGETS
                pipe.unet.add_adapter(lora, ADAPTER)
        for parameter in self.adapters().values():
            parameter.data = parameter.data.float()
        self._dtype, self._prior_dtype = next(pipe.unet.parameters()).dtype, dtype
        self._layers = {name: m for name, m in pipe.unet.named_modules() if isinstance(m, BaseTunerLayer)}
        self._merged: dict[str, Tensor] = {}
        self._mergeable = bool(self._layers) and self._dtype == torch.float32 and not compile
        if vae_slicing:
            pipe.vae.enable_slicing()
        for network in filter(None, (pipe.unet, self._prior)):
            network.set_attn_processor(ATTENTION[attention]())
            if compile:  # of forward alone: the hooks that count calls stay outside the compiled code
                network.forward = torch.compile(network.forward)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, L, D]; each prompt is encoded alone, once."""
        for prompt in prompts:
            if prompt not in self._texts:
                with torch.no_grad():
                    self._texts[prompt] = self.pipeline.encode_prompt(prompt, self.device, 1, False)[0][0]
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def predict(
        self, z: Tensor, t: Tensor, conditioning: Tensor, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """See `DiffusionModel.predict`. Guidance is `ε_∅ + w (ε_c − ε_∅)` in one call of doubled batch."""
        t = t.expand(len(z))
        guided = guided and self.guidance != 1
        if guided:
            null = self.encode([""]).expand_as(conditioning)
            inputs = (torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, conditioning]))
        else:
            inputs = (z, t, conditioning)
        if self.checkpointing and torch.is_grad_enabled():
            # The adapter switch is inside the checkpointed function, so the recomputation runs the same network.
            again = {"use_reentrant": False, "preserve_rng_state": False}
            output = checkpoint(self._denoise, *inputs, prior, self._merged, **again)
        else:
            output = self._denoise(*inputs, prior, self._merged)
        if guided:
            null_output, text_output = output.chunk(2)
            output = null_output + self.guidance * (text_output - null_output)
        if self._v_prediction:
            alpha = self._levels[t].view(-1, 1, 1, 1)
            output = alpha**0.5 * output + (1 - alpha) ** 0.5 * z
        return output

    def _denoise(self, z: Tensor, t: Tensor, text: Tensor, prior: bool, merged: dict[str, Tensor]) -> Tensor:
        network, dtype = (self._prior, self._prior_dtype) if prior and self._prior else (self.network, self._dtype)
        inputs = (z.to(dtype), t), {"encoder_hidden_states": text.to(dtype), "return_dict": False}
        with self._adapters_off() if prior or merged else nullcontext():
            if merged and not prior:
                return functional_call(network, merged, *inputs)[0].float()
            return network(*inputs[0], **inputs[1])[0].float()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """See `DiffusionModel.merged`: `W + BA` in the place of W, of a float32 denoiser with LoRA.

        In 16 bits the sum would be rounded, and the replay of what was sampled would be another network's.
        """
        before = self._merged
        if self._mergeable and not before:
            with torch.no_grad():
                self._merged = {
                    f"{name}.base_layer.weight": layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
                    for name, layer in self._layers.items()
                }
        try:
            yield
        finally:
            self._merged = before

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
        z = z / self.pipeline.vae.config.scaling_factor
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
        """LoRA: `pytorch_lora_weights.safetensors`, which `load_lora_weights` reads; full: a `unet` folder."""
        if self.finetune == "full":
            self.network.save_pretrained(folder / "unet")
        else:
            state = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(self.network).items()}
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; raises FileNotFoundError or ValueError."""
        if self.finetune == "full":
            state = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).state_dict()
            self.network.load_state_dict(state)
            return
        state = {name.removeprefix("unet."): tensor for name, tensor in load_file(folder / LORA_FILE).items()}
        own = get_peft_model_state_dict(self.network)
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError(f"{folder / LORA_FILE} does not fit this model's adapter (another model or lora_rank?)")
        set_peft_model_state_dict(self.network, state)

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """A small text-conditioned UNet; see `DiffusionModel.latent_network`."""
        return _LatentUNet(self.latent_shape, channels, layers_per_block, self.network.config.cross_attention_dim)

    def fingerprint(self) -> str:
        """Hash of weights, scheduler, guidance and precision."""
        return self._fingerprint


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

    def forward(self, z: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        return self.unet(z, t, encoder_hidden_states=conditioning.float(), return_dict=False)[0]


def _hash(pipe: StableDiffusionPipeline, *settings: object) -> str:
    digest = hashlib.blake2b(repr((settings, sorted(pipe.scheduler.config.items(), key=str))).encode(), digest_size=16)
    for part in ("unet", "vae", "text_encoder"):
        for name, tensor in sorted(getattr(pipe, part).state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
