"""The recipe of the few-step students, and the students that ship."""

from pathlib import Path

import pytest
import torch

from bench.models import emoji
from bench.models.catalogue import few_step
from bench.models.lora import LORA_FILE
from bench.recipe import distil
from bench.recipe.loop import Recipe
from bench.sampling.kernel import mean_square
from bench.sampling.noise import Noise

FEW, MANY = distil.STEPS, distil.TEACHER_STEPS


@pytest.mark.parametrize("name", distil.STUDENTS)
def test_a_student_that_ships_goes_the_way_of_its_guided_teacher(name):
    """On the same noise, much nearer than the network that it was, without guidance and in as few steps."""
    student, names = distil.STUDENTS[name], [("tiger", 0), ("noto fox", 1), ("a carrot", 2), ("owl", 3)]
    noise = Noise(1, "evaluate", names)
    teacher, teacher_kernel = distil.load(name, student.teacher(MANY))
    path = distil.states(teacher, teacher_kernel, names, noise)[:, :: MANY // FEW]
    model, kernel = distil.load(f"{name}_turbo", student.sampler)
    assert torch.equal(kernel.timesteps, teacher_kernel.timesteps[:: MANY // FEW])
    assert torch.equal(kernel.alphas_cumprod, teacher_kernel.alphas_cumprod[:: MANY // FEW])
    ours = distil.states(model, kernel, names, noise)
    before = distil.states(*distil.load(name, student.sampler), names, noise)
    for k in range(1, FEW + 1):
        assert mean_square(ours[:, k] - path[:, k]).mean() < 0.5 * mean_square(before[:, k] - path[:, k]).mean(), k
    card = few_step(f"{name}_turbo")
    assert (card.steps, card.spacing, card.teacher[0]) == ((FEW,), student.sampler.spacing, name)
    assert (emoji.TURBO / name / LORA_FILE).stat().st_size < 4e6


def test_a_student_learns_its_teachers_path_and_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "PART", 4)
    recipe, name = Recipe(tmp_path, "cpu", 0, {"distil-emoji_flow": 16}), "emoji_flow"
    texts, path = distil.make_paths(tmp_path, name, 6, FEW, seed=0)  # of as many steps: it has guidance to learn
    assert path.shape == (6, FEW + 1, 4, 8, 8)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert torch.equal(distil.make_paths(tmp_path, name, 6, FEW, seed=0)[1], path)  # read, not drawn again
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}

    model = distil.train(recipe, name, texts, path, batch=8, lr=3e-2)
    _, kernel = distil.load(name, distil.STUDENTS[name].sampler)

    def error(predict) -> float:
        k = torch.arange(FEW)
        output = predict(path[0, :-1], kernel.timesteps[k], model.encode(texts[:1] * FEW))
        return float(mean_square(kernel.mean(path[0, :-1], output, k) - path[0, 1:]).mean())

    with torch.no_grad():
        trained, before = error(model.predict), error(lambda *inputs: model.predict(*inputs, prior=True))
        assert trained < before / 2
        monkeypatch.setattr(emoji, "TURBO", tmp_path)
        distil.export(model, tmp_path / name)
        again, _ = distil.load("emoji_flow_turbo", distil.STUDENTS[name].sampler)
        assert error(again.predict) == pytest.approx(trained, rel=0.05)
