"""The contract of a model: of the adapter's switch, of what its output means, and of its agreement with diffusers."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bench import registry
from bench.diagnose.selftest.checking import Skipped, derivative_error, require
from bench.diagnose.selftest.device import device as pretended_device
from bench.diagnose.selftest.device import recording
from bench.errors import BenchError
from bench.model import Conditioning, DiffusionModel
from bench.models import catalogue
from bench.models.card import HubCard
from bench.models.cards import CARDS
from bench.models.checks import quiet_libraries
from bench.models.family import Family
from bench.models.folder import family_of
from bench.models.pipeline import PipelineModel
from bench.sampling.kernel import Kernel
from bench.sampling.noise import Noise, generator, seeded
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

PROMPTS = ["red apple", "a dog, from the side", "cat"]
SAMPLES = [(prompt, 0) for prompt in PROMPTS]
GUIDANCE = 3.0
SIZE, FRAMES = (64, 96), 5


@contextmanager
def present(name: str) -> Iterator[str]:
    """A name that loads inside the block. For a family's class, which has no weights, small random ones are written."""
    if name not in registry.plugins("pipelines"):
        catalogue.model_class(name)  # raises for a name or folder that is none
        yield name
        return
    cards = (c for c in CARDS.values() if isinstance(c, HubCard) and c.architecture.pipeline == name)
    card = next(cards, None)
    if card is None:
        raise BenchError(f"{name!r} has no small weights here: give a folder that holds one, bench selftest ./folder.")
    from bench.models.random_weights import write_pipeline

    with tempfile.TemporaryDirectory(prefix="bench-selftest-") as folder:
        with seeded(0, name), torch.no_grad():
            write_pipeline(card, Path(folder), "tiny")
        yield folder


def nudge(model: DiffusionModel, scale: float = 0.1) -> None:
    """Move the adapters off their start, where policy and prior are equal and half of every equation is zero."""
    numbers = generator(0, "weights", "nudge")
    for parameter in model.adapters().values():
        step = torch.from_numpy(numbers.standard_normal(tuple(parameter.shape), "float32"))
        parameter.data += scale * step.to(parameter)


def _model(name: str, *, guidance: float = GUIDANCE, seed: int = 0, nudged: bool = True, **options: Any) -> Any:
    """The model as it is built (at the start of its training, unless nudged)."""
    folder = catalogue.locate(name)
    kind = registry.load("models", name) if folder is None else family_of(folder)
    model, start = _built(kind, name, folder, guidance, seed, tuple(options.items()))
    for key, parameter in model.adapters().items():
        parameter.data.copy_(start[key])
        parameter.grad = None
    if nudged:
        nudge(model)
    return model


@lru_cache(maxsize=4)
def _built(kind: Any, name: str, folder: Path | None, guidance: float, seed: int, options: tuple) -> tuple[Any, dict]:
    quiet_libraries()
    settings = dict(options)
    place = settings.pop("device", torch.device("cpu"))
    config = ModelConfig(name=name, dtype="float32", lora=LoraConfig(rank=2), **_smallest(kind) | settings)
    try:
        model = kind.create(folder, config, guidance=guidance, device=place, seed=seed)
    except BenchError:  # without guidance at all, which it says
        model = kind.create(folder, config, guidance=1.0, device=place, seed=seed)
    return model, {key: parameter.detach().clone() for key, parameter in model.adapters().items()}


def _smallest(kind: type[DiffusionModel]) -> dict[str, Any]:
    """Settings for small samples of a family whose files name no size, and for several frames of one that has them."""
    if not issubclass(kind, Family) or kind.default_size is None:
        return {}
    return {"size": SIZE, "frames": FRAMES if kind.video else 1}


def _kernel(model: DiffusionModel, steps: int = 4) -> Kernel:
    """A deterministic chain that ends where the model's own scheduler does."""
    final = {"final_noise": 0.0} if model.output == "flow" else {}
    return catalogue.make_kernel(model.spec, SamplerConfig(steps=steps, eta=0.0, **final)).to(model.device)


def _latents(model: DiffusionModel, number: int = 0) -> Tensor:
    return Noise(0, "train", SAMPLES)(number, model.latent_shape).to(model.device)


def _times(model: DiffusionModel) -> Tensor:
    """Three that differ, one a row."""
    return _kernel(model).timesteps[:3]


def _predict(model: DiffusionModel, **options: Any) -> Tensor:
    return model.predict(_latents(model), _times(model), model.encode(PROMPTS), **options)


def _sample(model: DiffusionModel, kernel: Kernel) -> Tensor:
    batch = Batch(PROMPTS, SAMPLES, model.encode(PROMPTS))
    with torch.no_grad():
        return rollout(model, kernel, batch, Noise(0, "evaluate", SAMPLES)).latents[:, -1]


def _near(ours: Tensor, theirs: Tensor, rel: float = 1e-4) -> bool:
    return bool((ours - theirs).abs().max() <= rel * theirs.abs().max())


def predictions_and_images_are_well_formed(name: str) -> None:
    """one row per prompt, finite float32 latents, images in [0, 1] or points, the same twice, random state untouched"""
    model = _model(name)
    require((type(model).__doc__ or "").strip(), "the class has no docstring: say what it is.")
    conditioning = model.encode(PROMPTS)
    good = isinstance(conditioning, Conditioning) and len(conditioning) == len(PROMPTS)
    require(good, "encode must give a bench.model.Conditioning of one row a prompt.")
    z, state = _latents(model), torch.get_rng_state()
    before = z.clone()
    for options in ({}, {"prior": True}, {"guided": False}):
        output = model.predict(z, _times(model), conditioning, **options)
        good = output.dtype == torch.float32 and output.shape == z.shape
        require(good, f"predict gave {output.dtype} {list(output.shape)}: it must be float32 of the latents' shape.")
        require(output.isfinite().all(), "a prediction is not finite.")
        again = model.predict(z, _times(model), conditioning, **options)
        require(torch.equal(again, output), "the same latents have two predictions: is a dropout on?")
    image = model.decode(z)
    good = (len(image), image.shape[-3:-2], image.dim() < 6) == (len(z), (3,), True) and 0 <= float(
        image.min()
    ) <= float(image.max()) <= 1
    good = good or image.shape == z.shape  # points
    require(
        good,
        f"decode gave {list(image.shape)}: it must be images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1], or "
        "points.",
    )
    require(torch.equal(z, before), "the latents were changed in place.")
    require(torch.equal(state, torch.get_rng_state()), "global random state was used: see bench.sampling.noise.seeded.")
    with seeded(0, "latent network"):
        extra = model.latent_network([32, 32])(z, _times(model), conditioning)
    require(extra.shape == z.shape and not extra.any(), "latent_network must start at exactly zero, of z's shape.")


def neighbours_do_not_matter(name: str) -> None:
    """a row's conditioning, prediction and image do not depend on the rest of its batch"""
    model = _model(name)
    whole, z, t = model.encode(PROMPTS), _latents(model), _times(model)
    alone = Conditioning.join([model.encode([prompt]) for prompt in PROMPTS])
    same = all(torch.equal(part, alone.parts[key]) for key, part in whole.parts.items())
    require(same, "encode gives a prompt another row among others: encode each alone.")
    rows = [slice(i, i + 1) for i in range(len(z))]
    single = torch.cat([model.predict(z[row], t[row], whole[row]) for row in rows])
    require(_near(single, model.predict(z, t, whole)), "a latent's prediction depends on its neighbours.")
    single = torch.cat([model.decode(z[row]) for row in rows])
    require(_near(single, model.decode(z)), "a latent's image depends on its neighbours.")


def the_prior_switch_is_exact(name: str) -> None:
    """whatever the adapters hold, prior=True is the untrained model to the bit, and leaves the policy alone"""
    model = _model(name, nudged=False)
    prior = _predict(model, prior=True).detach()
    require(_near(_predict(model), prior, 1e-6), "an untrained policy differs from the prior: adapters start at zero.")
    nudge(model)
    policy = _predict(model)
    require(not _near(policy, prior, 1e-4), "the policy does not depend on the adapters.")
    z = _latents(model).requires_grad_()
    output = model.predict(z, _times(model), model.encode(PROMPTS), prior=True)
    require(torch.equal(output, prior), "prior=True depends on the adapters.")
    gradients = torch.autograd.grad(output.sum(), [z, *model.adapters().values()], allow_unused=True)
    require(gradients[0] is not None, "no gradient passes through the prior to the latents.")
    require(all(g is None for g in gradients[1:]), "a gradient of the prior reaches the adapters.")
    require(torch.equal(_predict(model), policy), "a prediction of the prior changes the policy's.")
    trainable = all(p.requires_grad for p in model.adapters().values())
    require(trainable and policy.requires_grad, "a prediction of the prior cleared requires_grad of the adapters.")
    with model.merged():
        require(torch.equal(_predict(model, prior=True), prior), "inside merged(), prior=True is another network.")
        require(_near(_predict(model), policy, 1e-3), "inside merged(), the policy is another network.")


def adapters_are_saved_and_loaded(name: str) -> None:
    """a model that reads the file predicts the same to the bit, and one that borrows the values the same to rounding"""
    model = _model(name)
    expected = _predict(model).detach()
    values = {key: parameter.detach().clone() for key, parameter in model.adapters().items()}
    other = _model(name, seed=1, nudged=False)
    with other.using(values):
        # torch chooses another product where nothing has a gradient
        require(_near(_predict(other), expected, 1e-5), "using() another's adapters does not give its predictions.")
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "adapter")
        other.load(Path(folder) / "adapter")
        require(torch.equal(_predict(other), expected), "what save wrote and load read predicts something else.")
        try:
            other.load(Path(folder) / "absent")
        except (OSError, ValueError):
            return
    require(False, "load of a folder that is not there raises nothing.")


def checkpointing_leaves_gradients_unchanged(name: str) -> None:
    """of latents and adapters, through policy, prior and decoder, and with guidance"""
    gradients = []
    for checkpointing in (False, True):
        model = _model(name, checkpointing=checkpointing)
        z, t, conditioning = _latents(model).requires_grad_(), _times(model), model.encode(PROMPTS)
        policy, prior = model.predict(z, t, conditioning), model.predict(z, t, conditioning, prior=True)
        total = model.decode(z - policy).square().mean() + (policy * prior).mean()
        gradients.append(torch.autograd.grad(total, [z, *model.adapters().values()], materialize_grads=True))
    same = all(_near(ours, theirs, 1e-3) for theirs, ours in zip(*gradients, strict=True))
    require(same, "gradients differ: a recomputed forward must switch the adapters as the first one did.")


def decode_is_differentiable(name: str) -> None:
    """its gradient agrees with central differences"""
    model = _model(name)
    error = derivative_error(lambda z: model.decode(z).flatten(1).mean(1), 0.5 * _latents(model))
    require(error < 0.03, f"the gradient is {error:.0%} from central differences at the best of four steps.")


def the_output_means_what_it_says(name: str) -> None:
    """a perfect output recovers a noised latent, and the stated reading of the network's own comes nearer than another

    Of a model that is code alone, the clean latent that it reads from nearly pure noise does not fall where the noise
    rises, as a posterior mean never does: its Jacobian is a covariance.
    """
    model = _model(name, nudged=False)
    kernel, noise, text = _kernel(model, 8), _latents(model, 1), model.encode(PROMPTS)
    clean, other = _sample(model, kernel), "v_prediction" if model.output == "epsilon" else "epsilon"
    errors = dict.fromkeys((model.output, other), 0.0)

    @torch.no_grad()
    def read(z: Tensor, k: int, output: Any) -> Tensor:
        predicted = model.predict(z, kernel.timesteps[k], text, prior=True, guided=False)
        return replace(kernel, output=output).clean(z, predicted, k)

    for k in range(1, kernel.steps):
        z = kernel.noised(clean, noise, k)
        recovered = kernel.clean(z, kernel.target(clean, noise, k), k)
        require(_near(recovered, clean, 1e-3), f"at step {k} a perfect output does not recover the clean latent.")
        scale = kernel.alpha_cumprod(k, z).sqrt() / kernel.noise_level(k, z)
        for reading in errors:
            errors[reading] += float(((read(z, k, reading) - clean) * scale).square().mean())
    if isinstance(model, PipelineModel) and errors[model.output] > 0.5 * (kernel.steps - 1):  # of noise of variance 1
        raise Skipped(
            "the network removes little noise: its weights are untrained, and diffusers' own call has to tell"
        )
    nearer = errors[model.output] < errors[other]
    require(nearer, f"output = {model.output!r}, but read as {other!r} it comes nearer to clean latents.")
    if not isinstance(model, PipelineModel):
        rise = read(noise + 0.01 * clean, 0, model.output) - read(noise - 0.01 * clean, 0, model.output)
        require((rise * clean).sum() > -1e-4 * clean.square().sum(), f"output = {model.output!r} is no posterior mean.")


def its_pipeline_agrees(name: str) -> None:
    """images of diffusers' own call equal ours to the bit, near with guidance and the adapter that it loads itself"""
    plain = _model(name, guidance=1.0, nudged=False)
    if not isinstance(plain, PipelineModel):
        raise Skipped("this model is no pipeline")
    pipe = plain.open()
    ours, theirs = _two_images(plain, pipe)
    require(torch.equal(ours, theirs), "diffusers' own call, without guidance and noise, draws another image.")
    trained = _model(name)
    with tempfile.TemporaryDirectory() as folder:
        trained.save(Path(folder))
        pipe.load_lora_weights(folder)
    ours, theirs = _two_images(trained, pipe)
    require(_near(ours, theirs, 2e-3), "with guidance and the saved adapter diffusers' own call draws another image.")


@torch.no_grad()
def _two_images(model: PipelineModel, pipe: DiffusionPipeline) -> tuple[Tensor, Tensor]:
    """Of the same noise: the model's, and what the pipeline's own call makes."""
    kernel, start = _kernel(model, 3), Noise(0, "evaluate", SAMPLES)(0, model.latent_shape)
    theirs = model.call_pipeline(pipe, model.encode(PROMPTS), start, kernel, "pt")
    return model.decode(_sample(model, kernel)), theirs


def it_runs_on_a_device(name: str) -> None:
    """on a pretended GPU no operation mixes devices, sampling waits for nothing, and gradients are those of the CPU"""
    results = []
    for place in (torch.device("cpu"), pretended_device()):
        with recording():
            model = _model(name, device=place)
            kernel, z = _kernel(model, 3), _latents(model).requires_grad_()
            output = model.predict(z, _times(model), model.encode(PROMPTS)) + _predict(model, prior=True)
            total = model.decode(z - output).square().mean()
            gradients = torch.autograd.grad(total, [z, *model.adapters().values()], materialize_grads=True)
            with recording() as ledger:
                latents = _sample(model, kernel)
            results.append([latents.cpu(), *(gradient.cpu() for gradient in gradients)])
    waited = ledger.synchronisations.total() + ledger.waits.total()
    known = kernel.steps * model.waits if isinstance(model, Family) else 0
    require(waited <= known, f"sampling waited for the device {waited} times: {ledger.describe()}.")
    same = all(_near(ours, theirs, 1e-3) for theirs, ours in zip(*results, strict=True))
    require(same, "samples or gradients differ from those on the CPU.")


CHECKS: list[Callable[[str], None]] = [
    predictions_and_images_are_well_formed,
    neighbours_do_not_matter,
    the_prior_switch_is_exact,
    adapters_are_saved_and_loaded,
    checkpointing_leaves_gradients_unchanged,
    decode_is_differentiable,
    the_output_means_what_it_says,
    its_pipeline_agrees,
    it_runs_on_a_device,
]
