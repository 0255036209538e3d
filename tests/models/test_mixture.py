"""Pictures with a known answer: density, score and draws against autograd, Monte Carlo and closed forms."""

import numpy as np
import pytest
import torch

from bench.errors import BenchError
from bench.evaluation import evaluator
from bench.models.mixture import EmojiMixture, EmojiMixtureFlow, Mixture
from bench.reporting.rows import read_rows
from bench.sampling.noise import generator

PROMPTS = ["tiger", "penguin", "tiger", "carrot"]


@pytest.fixture(scope="module", params=[EmojiMixture, EmojiMixtureFlow])
def model(request):
    return request.param(dtype=torch.float64)


def small(components: int = 3) -> Mixture:
    """Two prompts, four dimensions, rank 2, float64."""
    rng = generator(0, "select", "small mixture")

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    tensors = {"log_weights": normal(2, components), "means": 2 * normal(2, components, 4)}
    tensors |= {"bases": torch.linalg.qr(normal(2, components, 4, 2)).Q, "scales": normal(2, components, 2).abs() + 0.5}
    return Mixture(tensors | {"floor": torch.tensor(0.3)}, "abcdef"[:components], torch.float64)


def gaussian(mixture: Mixture, c: int, j: int, alpha: float = 1.0, s: float = 0.0):
    """One component of the noised data, with its covariance as a matrix."""
    eye = torch.eye(mixture.means.shape[2], dtype=torch.float64)
    basis = mixture.bases[c, j] * mixture.scales[c, j]
    rest = mixture.floor**2 * (eye - mixture.bases[c, j] @ mixture.bases[c, j].T)
    covariance = alpha**2 * (basis @ basis.T + rest) + s**2 * eye
    return torch.distributions.MultivariateNormal(alpha * mixture.means[c, j], covariance)


@pytest.mark.parametrize(("alpha", "s"), [(1.0, 0.0), (0.9, 0.1), (0.4, 0.6), (0.05, 0.999)])
def test_density_and_score_are_those_of_the_covariance_matrices(alpha, s):
    mixture = small()
    c = torch.tensor([0, 1, 1])
    z = torch.from_numpy(generator(1, "select", "points").standard_normal((3, 4))).requires_grad_()
    logs = (
        torch.stack(
            [
                torch.stack([gaussian(mixture, int(c[i]), j, alpha, s).log_prob(z[i]) for j in range(3)])
                for i in range(3)
            ]
        )
        + mixture.log_weights[c]
    )
    density = logs.logsumexp(1)
    (score,) = torch.autograd.grad(density.sum(), z)
    level = torch.tensor(alpha, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    posterior = mixture.posterior(z, c, *level)
    weights = posterior.log_weights.exp()
    noise, clean = mixture.noise(c, *level, posterior, weights), mixture.clean(c, level[0], posterior, weights)
    assert torch.allclose(posterior.log_density, density, rtol=0, atol=1e-10)
    assert torch.allclose(posterior.log_weights, logs.log_softmax(1), rtol=0, atol=1e-10)
    assert torch.allclose(-noise.vector(z, posterior.frame), s * score, rtol=0, atol=1e-9)
    # Tweedie: α x̂ = z + s² score
    assert torch.allclose(alpha * clean.vector(z, posterior.frame), z + s**2 * score, rtol=0, atol=1e-9)


def test_one_component_has_the_posterior_of_a_gaussian():
    mixture, alpha, s = small(1), 0.6, 0.5
    z = torch.from_numpy(generator(2, "select", "points").standard_normal((2, 4)))
    rows, level = torch.tensor([0, 1]), torch.tensor(alpha).double()
    posterior = mixture.posterior(z, rows, level, torch.tensor(s).double())
    clean = mixture.clean(rows, level, posterior, torch.ones(2, 1).double()).vector(z, posterior.frame)
    for c in range(2):
        data = gaussian(mixture, c, 0)
        gain = alpha * data.covariance_matrix @ torch.linalg.inv(gaussian(mixture, c, 0, alpha, s).covariance_matrix)
        assert torch.allclose(clean[c], data.loc + gain @ (z[c] - alpha * data.loc), atol=1e-10)
        standard = mixture.bases[c, 0] / mixture.scales[c, 0]  # x − m to its coordinates
        covariance = standard.T @ (data.covariance_matrix - alpha * gain @ data.covariance_matrix) @ standard
        assert torch.allclose(posterior.coordinates[c, 0], (clean[c] - data.loc) @ standard, atol=1e-10)
        assert torch.allclose(covariance, posterior.deviations[c, 0].square().diag(), atol=1e-10)


def test_draws_have_the_density():
    """Shares and moments of the draws; and the density integrates to one under the draws of another mixture."""
    mixture, n = small(), 40_000
    c = torch.zeros(n, dtype=torch.long)
    x, component = mixture.draw(c, generator(3, "select", "draws"))
    shares = torch.bincount(component, minlength=3) / n
    assert torch.allclose(shares, mixture.log_weights[0].exp().to(shares), atol=0.01)
    for j in range(3):
        law, mine = gaussian(mixture, 0, j), x[component == j]
        assert torch.allclose(mine.mean(0), law.loc, atol=0.1)
        assert torch.allclose(mine.T.cov(), law.covariance_matrix, atol=0.1 * float(law.covariance_matrix.max()))
    wide = torch.distributions.MultivariateNormal(x.mean(0), 2 * x.T.cov())
    rng = torch.from_numpy(generator(4, "select", "wide").standard_normal((n, 4)))
    points = wide.loc + rng @ wide.scale_tril.T
    ratio = (mixture.log_density(points, c) - wide.log_prob(points)).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=5 * float(ratio.std()) / n**0.5)


def test_the_network_predicts_what_the_density_says(model):
    """ε of the diffusion and the velocity of the flow, from the autograd score of the noised density."""
    conditioning = model.encode(PROMPTS)
    c = conditioning.parts["concept"]
    z = torch.from_numpy(generator(5, "select", "latents").standard_normal((4, 4, 8, 8))).requires_grad_()
    for t in (1, 301, 981):
        s = torch.tensor(t / 1000, dtype=torch.float64)
        if model.spec.alphas_cumprod is not None:
            s = (1 - model.spec.alphas_cumprod[t].double()).sqrt()
        alpha = 1 - s if model.spec.alphas_cumprod is None else (1 - s**2).sqrt()
        density = model.mixture.posterior(z.flatten(1), c, alpha, s).log_density
        (score,) = torch.autograd.grad(density.sum(), z)
        noise = -s * score
        wanted = noise if model.spec.alphas_cumprod is not None else noise - (z + s**2 * score) / alpha
        prior = model.predict(z, torch.tensor(t), conditioning, prior=True)
        assert torch.allclose(prior, wanted, rtol=1e-6, atol=1e-8)
        assert torch.equal(prior, model.predict(z, torch.tensor(t), conditioning))  # untrained: the prior


def test_shifts_of_the_posterior_reach_any_mixture_with_the_same_directions(model):
    """Other weights and means along the bases are log-weight and coordinate shifts, exact at every level."""
    conditioning = model.encode(["tiger"])
    c, mixture = conditioning.parts["concept"], model.mixture
    rng = generator(6, "select", "other")
    logits = torch.from_numpy(rng.standard_normal(6))
    moved = torch.from_numpy(rng.standard_normal((6, mixture.scales.shape[2])))
    tensors = {"log_weights": mixture.log_weights, "means": mixture.means, "bases": mixture.bases}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["means"][c] += torch.einsum("bjdr,bjr->bjd", mixture.bases[c], mixture.scales[c] * moved[None])
    tensors["log_weights"][c] += logits
    other = Mixture(tensors | {"scales": mixture.scales, "floor": mixture.floor}, mixture.names, torch.float64)
    x, _ = other.draw(c, np.random.default_rng(0))
    z, alpha, s = 0.7 * x, torch.tensor(0.7).double(), torch.tensor(0.6).double()
    before, after = (one.posterior(z, c, alpha, s) for one in (mixture, other))
    moves = (after.coordinates + moved - before.coordinates) / before.deviations
    weights = after.log_weights.exp()
    for mine, wanted in (
        (mixture.clean(c, alpha, before, weights, moves), other.clean(c, alpha, after, weights)),
        (mixture.noise(c, alpha, s, before, weights, moves), other.noise(c, alpha, s, after, weights)),
    ):
        assert torch.allclose(mine.vector(z, before.frame), wanted.vector(z, after.frame), atol=1e-9)


def test_latent_networks_start_at_zero_and_hold_no_prior(model):
    network = model.latent_network([8])
    z, conditioning = torch.ones(2, 4, 8, 8, dtype=torch.float64), model.encode(PROMPTS[:2])
    for t in (0, 500):
        assert not network(z, torch.full((2,), t), conditioning).any()
    assert all(name.startswith("shifts.") for name in network.state_dict())


def test_a_prompt_that_is_no_concept_is_refused(model):
    with pytest.raises(BenchError, match=r"'tigre'.*tiger"):
        model.encode(["tigre"])


def test_draws_decode_to_pictures(model):
    c = model.encode(PROMPTS).parts["concept"]
    x, _ = model.mixture.draw(c, np.random.default_rng(0))
    images = model.decode(x.view(-1, 4, 8, 8))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1 and float(images.std()) > 0.1


def test_a_run_measures_its_distance_to_the_target(bench, tmp_path, monkeypatch):
    """Rows with floors, samples by component, and a target that a second run finds in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator, "DRAWS", 104)
    settings = ["prompts.limit=1", "evaluation.train_prompts=1", "evaluation.validation_prompts=1", "evaluation.at=[]"]
    settings += ["evaluation.samples_per_prompt=8", "train.prompts_per_round=1", "sampler.steps=6"]
    settings += ["train.samples_per_prompt=4", "reward.beta=0.01"]
    settings += ["evaluation.metrics=[reward,share_tv,within_mode,prior_nll,target_sw2,path_kl]"]
    words = [word for setting in settings for word in ("--set", setting)]
    run = ["run", "nabla_gfn", "--model", "emoji_mixture_flow", "--updates", 2, *words]
    status, text = bench(*run, "--out", tmp_path / "one")
    assert status == 0, text
    rows = read_rows(tmp_path / "one" / "rows.parquet").set_index("metric")
    names = ("share_tv", "within_mode/mean", "within_mode/spread", "target_sw2")
    for name in (f"{name}/{split}" for name in names for split in ("train", "validation")):
        assert rows.loc[[name, f"{name}/floor"], "value"].between(0, 10).all()
    assert (tmp_path / "one" / "components.png").is_file()
    before = sorted((tmp_path / "cache").rglob("*.checked"))
    run = ["run", "prior", *run[2:4], *words]  # the method does not matter here
    status, text = bench(*run, "--out", tmp_path / "two", "--set", "reward.beta=0.005")
    assert status == 0, text
    assert sorted((tmp_path / "cache").rglob("*.checked")) == before  # rewards do not depend on β
    assert "model.fingerprint" in rows["settings"].iloc[0]
    # nothing is drawn that no metric asks for
    status, text = bench(
        *run, "--out", tmp_path / "three", "--set", "evaluation.metrics=[reward]", "--set", "sampler.steps=5"
    )
    assert status == 0, text
    assert not (tmp_path / "three" / "components.png").exists()
    drawn = len(list((tmp_path / "cache").rglob("*.checked"))) - len(before)
    assert drawn == 3  # the prior's sets on another sampler


def test_an_unknown_prompt_is_told_before_anything_is_loaded(bench, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("tiger\nunicycle\n", encoding="utf8")
    status, text = bench("run", "ddpo", "--model", "emoji_mixture", "--prompts", prompts, "--dry-run")
    assert status == 2
    assert "'unicycle'" in text
