"""The trainable adapter of a denoiser: peft's LoRA or DoRA, which can be switched off and merged into the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import BenchError, did_you_mean
from bench.sampling.noise import seeded
from bench.settings import LoraConfig

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for


def add_lora(network: Any, options: LoraConfig, targets: Sequence[str]) -> None:
    """Add the adapter to a denoiser, with or without storage. targets: layers that get one where no option names any.

    Raises BenchError for options that do not fit the network.
    """
    chosen = list(targets) if options.target_modules is None else options.target_modules
    names = {name for name, _ in network.named_modules()}
    for target in chosen if isinstance(chosen, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {name.rpartition(".")[2] for name in names}
            raise BenchError(
                f"model.lora.target_modules: no layer's name ends in {target!r}{did_you_mean(target, ends)}"
            )
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,
        target_modules=chosen,
        use_dora=options.use_dora,
        init_lora_weights="gaussian" if options.init == "gaussian" else True,
    )
    try:
        network.add_adapter(config, ADAPTER)
    except (ValueError, TypeError, NotImplementedError) as error:  # a kind of layer that cannot have one
        raise BenchError(f"model.lora with target_modules = {options.target_modules}: {error}") from None


class Adapters:
    """What peft has added to a network, switched off and merged as one. mergeable: whether it is a sum with weights."""

    def __init__(self, network: Any, mergeable: bool):
        self.network, self.mergeable = network, mergeable
        self.layers: dict[str, Any] = {name: m for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)}

    @contextmanager
    def off(self) -> Iterator[None]:
        """A block in which the network is the prior."""
        # The layers' own flag: diffusers' disable_adapters() would also clear requires_grad for good.
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """`W + Σ BA` of every adapted layer, by the names of the network's parameters."""
        return {
            f"{name}.base_layer.weight": sum(
                (layer.get_delta_weight(one) for one in layer.active_adapters if one in layer.lora_A),
                start=layer.base_layer.weight,
            )
            for name, layer in self.layers.items()
        }


class LoraAdapter(Adapters):
    """The adapter in a denoiser. Its parameters are float32 whatever the network's precision.

    seed: of the first values; they leave the network's output as it is.
    """

    def __init__(self, network: Any, options: LoraConfig, targets: Sequence[str], seed: int):
        with seeded(seed, "lora"):
            add_lora(network, options, targets)
        super().__init__(network, mergeable=not options.use_dora)
        self.scale = (options.alpha or options.rank) / options.rank
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if options.use_dora:
            for layer in self.layers.values():  # the norms of 16-bit weights, not rounded: the start is the prior
                dora, weight = layer.lora_magnitude_vector[ADAPTER], layer.base_layer.weight.float()
                dora.weight.data = dora.get_weight_norm(weight, torch.zeros_like(weight), scaling=1.0)

    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors on the CPU, by peft's names.

        The scale is in the weights of B: a reader without our settings takes it for 1.
        """
        state = peft.get_peft_model_state_dict(self.network)
        return {n: (t * self.scale if ".lora_B" in n else t).cpu() for n, t in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Read what `state` gave. Raises ValueError if names or shapes differ."""
        ours = peft.get_peft_model_state_dict(self.network)
        if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError("it does not fit this model's adapter (another model, or other settings of model.lora?)")
        state = {n: t / self.scale if ".lora_B" in n else t for n, t in state.items()}
        peft.set_peft_model_state_dict(self.network, state)

    def save_peft(self, folder: Path) -> None:
        """Write the adapter as `peft.PeftModel.from_pretrained(network, folder)` reads it."""
        config = copy(self.network.peft_config[ADAPTER])
        config.lora_alpha = config.r  # `state` has the scale in the weights
        config.save_pretrained(folder)
        state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in self.state().items()}
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})

    def merge(self) -> None:
        """Add the adapter to the network's weights, in float32, and remove it. Nothing can be trained afterwards."""
        dtype = next(layer.base_layer.weight.dtype for layer in self.layers.values())
        nn.Module.to(self.network, torch.float32)  # diffusers' own warns
        self.network.fuse_lora()
        self.network.unload_lora()
        nn.Module.to(self.network, dtype)
