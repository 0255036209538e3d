"""Pictures whose distribution is known: a mixture of Gaussians in the latent space of an autoencoder.

A prompt c has J components of weight π_j, `N(m_j, U_j S_j² U_jᵀ + v (I − U_j U_jᵀ))`, with R orthonormal columns in
U_j and a diagonal S_j. Density, score and draws are exact, on the diffusion path and on the flow path. So is what a
finetuned model is measured against: which component a latent belongs to, where in it, and how likely the prior finds
it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.errors import BenchError, did_you_mean
from bench.model import Conditioning, ModelSpec
from bench.models import emoji
from bench.models.emoji_mixture import COMPONENTS, FILE
from bench.models.exact import TIMES, ExactModel, time_features
from bench.models.fingerprint import identity
from bench.runtime.digests import digest
from bench.sampling.noise import seeded

LATENT = (4, 8, 8)


@dataclass(frozen=True)
class Posterior:
    """What the prior knows of the clean latent x from `z = α x + s ε`, for each component.

    log_weights: [B, J], log-probability of the component. coordinates: [B, J, R], the mean of `S⁻¹ Uᵀ (x − m)`, and
    deviations: [B, J, R], its standard deviations. log_density: [B], of z.
    Of the arithmetic: projections `Uᵀ (z − α m)` and their variances [B, J, R], the variance b of z in other
    directions, and frame [B, D, J (1 + R)], the means and bases of the rows' prompts.
    """

    log_weights: Tensor
    coordinates: Tensor
    deviations: Tensor
    log_density: Tensor
    projections: Tensor
    variances: Tensor
    b: Tensor
    frame: Tensor


@dataclass(frozen=True)
class Combination:
    """A vector of latent space as `z` times a number, plus means and bases times coefficients."""

    z: Tensor  # [B, 1, 1] or []
    means: Tensor  # [B, J]
    bases: Tensor  # [B, J, R]

    def __sub__(self, other: "Combination") -> "Combination":
        return Combination(self.z - other.z, self.means - other.means, self.bases - other.bases)

    def vector(self, z: Tensor, frame: Tensor) -> Tensor:
        """[B, D]. z: [B, D]; frame: of the `Posterior`."""
        coefficients = torch.cat([self.means, self.bases.flatten(1)], 1)
        return self.z.flatten()[:, None] * z + torch.bmm(frame, coefficients[..., None])[..., 0]


class Mixture(nn.Module):
    """The mixtures of C prompts.

    names: of the J components. log_weights: [C, J]; means: [C, J, D]; bases: [C, J, D, R], orthonormal columns;
    scales: [C, J, R], S; floor: [], `√v`. In the methods c, long [B], is the prompt of a row, and latents are flat.
    """

    log_weights: Tensor
    scales: Tensor
    floor: Tensor
    frame: Tensor  # [C, D, J (1 + R)]: the means, then the bases: a row's arithmetic is two products with its frame
    projected: Tensor  # [C, J, R]: Uᵀ m
    norms: Tensor  # [C, J]: ‖m‖²

    def __init__(self, tensors: dict[str, Tensor], names: Sequence[str], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.names = tuple(names)
        log_weights, means, bases = (tensors[name].to(dtype) for name in ("log_weights", "means", "bases"))
        gram = torch.linalg.cholesky(bases.mT @ bases)  # stored columns are orthonormal to half precision only
        bases = torch.linalg.solve_triangular(gram.mT, bases, upper=True, left=False)
        self.register_buffer("log_weights", log_weights.log_softmax(1))
        self.register_buffer("scales", tensors["scales"].to(dtype))
        self.register_buffer("floor", tensors["floor"].to(dtype))
        self.register_buffer("frame", torch.cat([means.mT, bases.permute(0, 2, 1, 3).flatten(2)], 2))
        self.register_buffer("projected", torch.einsum("cjd,cjdr->cjr", means, bases))
        self.register_buffer("norms", means.square().sum(2))

    @property
    def means(self) -> Tensor:
        """m, [C, J, D]."""
        return self.frame[..., : len(self.names)].mT

    @property
    def bases(self) -> Tensor:
        """U, [C, J, D, R]."""
        return self.frame[..., len(self.names) :].unflatten(2, self.scales.shape[1:]).transpose(1, 2)

    def posterior(self, z: Tensor, c: Tensor, alpha: Tensor, s: Tensor) -> Posterior:
        """See `Posterior`. alpha, s: of the path, [B, 1, 1] or []."""
        frame, scales, count = self.frame[c], self.scales[c], len(self.names)
        z = z.to(frame)
        products = torch.bmm(z[:, None], frame)[:, 0]
        projections = products[:, count:].view_as(scales) - alpha * self.projected[c]
        variances, b = alpha**2 * scales**2 + s**2, alpha**2 * self.floor**2 + s**2
        line = alpha.flatten()[:, None]  # for [B, J]
        distance = z.square().sum(1, keepdim=True) - 2 * line * products[:, :count] + line**2 * self.norms[c]
        rest = (distance - projections.square().sum(2)) / b.flatten()[:, None]
        determinant = variances.log().sum(2) + (z.shape[1] - scales.shape[2]) * b.log().flatten()[:, None]
        squares = rest + (projections.square() / variances).sum(2) + determinant + z.shape[1] * math.log(2 * math.pi)
        joint = self.log_weights[c] - squares / 2
        coordinates, deviations = alpha * scales / variances * projections, s / variances.sqrt()
        weights, density = joint.log_softmax(1), joint.logsumexp(1)
        return Posterior(weights, coordinates, deviations, density, projections, variances, b, frame)

    def noise(
        self, c: Tensor, alpha: Tensor, s: Tensor, posterior: Posterior, weights: Tensor, moves: Tensor | None = None
    ) -> Combination:
        """The mean of ε. weights: [B, J], of the components. moves: [B, J, R], of the coordinates, in deviations."""
        along = s * (1 / posterior.variances - 1 / posterior.b) * posterior.projections
        if moves is not None:
            along = along - alpha * self.scales[c] / posterior.variances.sqrt() * moves
        scale = s / posterior.b
        return Combination(scale, -(alpha * scale).flatten()[:, None] * weights, weights[..., None] * along)

    def clean(
        self, c: Tensor, alpha: Tensor, posterior: Posterior, weights: Tensor, moves: Tensor | None = None
    ) -> Combination:
        """The mean of x; see `noise`."""
        coordinates, scale = posterior.coordinates, alpha * self.floor**2 / posterior.b
        if moves is not None:
            coordinates = coordinates + posterior.deviations * moves
        along = self.scales[c] * coordinates - scale * posterior.projections
        return Combination(scale, (1 - alpha * scale).flatten()[:, None] * weights, weights[..., None] * along)

    def log_density(self, x: Tensor, c: Tensor) -> Tensor:
        """Log-density [B] of clean latents, in nats."""
        one = torch.ones((), dtype=self.frame.dtype, device=x.device)
        return self.posterior(x, c, one, 0 * one).log_density

    def draw(self, c: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Independent draws [B, D], and the components that they come from, long [B]; on the mixture's device."""
        shares = self.log_weights[c].exp().cumsum(1)
        place = torch.from_numpy(rng.random((len(c), 1))).to(shares)
        chosen = (place > shares).sum(1).clamp(max=len(self.names) - 1)
        inside = torch.from_numpy(rng.standard_normal((len(c), self.scales.shape[2]))).to(shares)
        around = torch.from_numpy(rng.standard_normal((len(c), self.frame.shape[1]))).to(shares)
        bases = self.bases[c, chosen]
        inside = self.scales[c, chosen] * inside - self.floor * torch.einsum("bd,bdr->br", around, bases)
        return self.means[c, chosen] + self.floor * around + torch.einsum("bdr,br->bd", bases, inside), chosen


class Shifts(nn.Module):
    """How finetuning moves the posterior of the clean latent: two hidden layers, zero at the start.

    It sees the posterior (weights, and coordinates times weights), the prompt's text features and the time, and gives
    shifts of the components' log-weights [B, J], and of the coordinates [B, J, R] in posterior deviations. Any tilt
    `p_# exp(βr)` has a posterior that differs by such shifts, but for directions outside the bases.
    """

    def __init__(self, components: int, rank: int, text: int, dtype: torch.dtype, width: int = 128):
        super().__init__()
        self.sizes = components, components * rank
        hidden = [nn.Linear(sum(self.sizes) + text + 16, width, dtype=dtype), nn.Linear(width, width, dtype=dtype)]
        last = nn.Linear(width, sum(self.sizes), dtype=dtype)
        self.layers = nn.Sequential(hidden[0], nn.SiLU(), hidden[1], nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, posterior: Posterior, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """t: times [B]; text: [B, T]."""
        weights = posterior.log_weights.exp()
        places = (weights[..., None] * posterior.coordinates).flatten(1)
        shifts = self.layers(torch.cat([weights, places, text, time_features(t, text.dtype)], 1))
        logits, moves = shifts.split(self.sizes, 1)
        return logits, moves.view_as(posterior.coordinates)


class _Denoiser(nn.Module):
    """The prior's exact prediction, or that of its shifted posterior. alphas_cumprod: None for a rectified flow."""

    alphas: Tensor | None

    def __init__(self, mixture: Mixture, alphas_cumprod: Tensor | None, finetuned: Shifts):
        super().__init__()
        self.register_buffer("alphas", alphas_cumprod)
        self.mixture, self.finetuned = mixture, finetuned

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning, prior: bool) -> Tensor:
        c, text = conditioning.parts["concept"], conditioning.parts["text"]
        alpha, s = _levels(t, self.alphas, z.dtype)
        flat = z.flatten(1)
        posterior, moves = self.mixture.posterior(flat, c, alpha, s), None
        log_weights = posterior.log_weights
        if not prior:
            logits, moves = self.finetuned(posterior, t, text)
            log_weights = log_weights + logits
        weights = log_weights.softmax(1)
        output = self.mixture.noise(c, alpha, s, posterior, weights, moves)
        if self.alphas is None:
            output = output - self.mixture.clean(c, alpha, posterior, weights, moves)
        return output.vector(flat, posterior.frame).view_as(z)


class _LogDensityGradient(nn.Module):
    """`(z, t, conditioning) → [B, *latent]`: of the log-density that `shifts` of the posterior add; zero at the start.

    It is `(x̂' − x̂) α / (s² + v)`, with x̂ and x̂' the mean clean latents before and after the shifts.
    """

    def __init__(self, mixture: Mixture, alphas_cumprod: Tensor | None, shifts: Shifts):
        super().__init__()
        self.shifts, self._path = shifts, (mixture, alphas_cumprod)  # in a tuple: the prior is not trained or saved

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        mixture, alphas = self._path
        c, text = conditioning.parts["concept"], conditioning.parts["text"]
        alpha, s = _levels(t, alphas, mixture.frame.dtype)
        flat = z.flatten(1)
        posterior = mixture.posterior(flat, c, alpha, s)
        logits, moves = self.shifts(posterior, t, text)
        before, after = posterior.log_weights.softmax(1), (posterior.log_weights + logits).softmax(1)
        moved = mixture.clean(c, alpha, posterior, after, moves) - mixture.clean(c, alpha, posterior, before)
        scale = (alpha / (s**2 + mixture.floor**2)).flatten()[:, None]
        return (scale * moved.vector(flat, posterior.frame)).view_as(z)


def _levels(t: Tensor, alphas_cumprod: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Signal level α and noise level s at times t [B], each [B, 1, 1]; alphas_cumprod: None for a rectified flow."""
    if alphas_cumprod is None:
        s = t.to(dtype)[:, None, None] / TIMES
        return 1 - s, s
    t = t[:, None, None]
    return alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()


class EmojiMixture(ExactModel):
    """Pictures with a known answer: a mixture of Gaussians in the latent space of `emoji`, exact score.

    Six components a prompt: three drawing styles, on a light and a dark background. The schedule and the decoder are
    those of `emoji`, and so are the prompts, plain names of 123 things.
    """

    is_flow = False
    decoder_batch = 8  # as for `emoji`
    mixture: Mixture

    def __init__(
        self,
        tensors: dict[str, Tensor] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        from diffusers import AutoencoderKL, DDIMScheduler  # takes seconds, and runs on points import this module too

        self.device, self.dtype = torch.device(device), dtype
        tensors = tensors or load_file(FILE)
        scheduler = DDIMScheduler.from_pretrained(emoji.WEIGHTS / "scheduler")
        alphas = None if self.is_flow else scheduler.alphas_cumprod
        if alphas is None:
            self.spec = ModelSpec(latent_shape=LATENT, output="flow", spacing="shifted", tokens=64)
        else:
            self.spec = ModelSpec(
                latent_shape=LATENT,
                alphas_cumprod=alphas,
                final_alpha=float(scheduler.final_alpha_cumprod),
                steps_offset=31,  # 20 steps run from t = 981 to 31, where the noise is that of the components
            )
        self.mixture = Mixture(tensors, COMPONENTS, dtype)
        self.text = tensors["text"].to(self.device, dtype)
        self.concepts = {concept["name"]: place for place, concept in enumerate(emoji.concepts())}
        with seeded(seed, "adapter"):
            self.finetuned = self._shifts()
        self._alphas = None if alphas is None else alphas.to(self.device, dtype)
        self.network = _Denoiser(self.mixture, self._alphas, self.finetuned).to(self.device)
        self.vae = AutoencoderKL.from_pretrained(emoji.WEIGHTS / "vae", torch_dtype=torch.float32).to(self.device)
        self.vae.requires_grad_(False).eval()
        self._replaced: dict[str, Tensor] = {}

    def _shifts(self) -> Shifts:
        components, rank = self.mixture.scales.shape[1:]
        return Shifts(components, rank, self.text.shape[1], self.dtype)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Numbers and text features of the concepts. Raises BenchError for a prompt that is none."""
        if strange := [prompt for prompt in prompts if prompt not in self.concepts]:
            hint = did_you_mean(strange[0], self.concepts)
            raise BenchError(f"this model knows no prompt {strange[0]!r}{hint} `--prompts emoji` has all it knows.")
        concept = torch.tensor([self.concepts[prompt] for prompt in prompts], device=self.device)
        return Conditioning({"concept": concept, "text": self.text[concept]})

    def decode(self, z: Tensor) -> Tensor:
        """See `DiffusionModel.decode`; 32 at a time, which on a CPU takes two thirds of the time of 128."""
        parts = (z.float() / self.vae.config.scaling_factor).split(32)
        return torch.cat([(self.vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in parts])

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """The gradient of a log-density that shifts of the finetuned part's kind add. Sizes are ignored."""
        return _LogDensityGradient(self.mixture, self._alphas, self._shifts().to(self.device))

    @cached_property
    def _fingerprint(self) -> str:
        levels = None if self.spec.alphas_cumprod is None else self.spec.alphas_cumprod.tolist()
        parts = {"mixture": identity(self.mixture), "decoder": identity(self.vae), "levels": levels}
        return digest(parts | {"concepts": list(self.concepts)})

    def fingerprint(self) -> str:
        """A hash of mixture, decoder, schedule and precision."""
        return self._fingerprint


class EmojiMixtureFlow(EmojiMixture):
    """Pictures with a known answer as a rectified flow, exact velocity."""

    is_flow = True
