"""Videos: what rewards, metrics and sheets see of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from bench.evaluation.features import middle_frame
from bench.evaluation.image_folder import save_images
from bench.evaluation.scores import score_samples
from bench.metric import Samples
from bench.reward import Reward, score
from bench.weighted import weighted_sum

PROMPTS = ["cat", "dog"]


class Red(Reward):
    """Mean red of a picture."""

    scale, source = "0 to 1", "test"

    def __call__(self, images, prompts):
        assert images.shape[1:] == (3, 4, 6) and len(images) == len(prompts)
        return images[:, 0].flatten(1).mean(1) + torch.tensor([float(p == "dog") for p in prompts])


class Motion(Reward):
    """Mean absolute difference of neighbouring frames; 0 of a picture."""

    scale, source, frames = "0 to 1", "test", True

    def __call__(self, images, prompts):
        assert images.shape[2:] == (3, 4, 6) and len(images) == len(prompts)
        return images.diff(dim=1).abs().flatten(1).sum(1) / images[0, 0].numel()


def made(kind: type[Reward]) -> Reward:
    return kind(kind.Config())


def test_a_reward_of_pictures_scores_a_video_by_its_frames_mean_and_one_of_videos_sees_it_whole():
    videos = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    red, motion = score(made(Red), "red", videos, PROMPTS), score(made(Motion), "motion", videos, PROMPTS)
    expected = videos[:, :, 0].flatten(1).mean(1) + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(red, expected)
    (ours,), (theirs,) = (torch.autograd.grad(values.sum(), videos, retain_graph=True) for values in (red, expected))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(motion, made(Motion)(videos, PROMPTS))
    assert not score(made(Motion), "motion", videos[:, 0].detach(), PROMPTS).any()  # a picture is a video of one frame
    both = weighted_sum("red+2*motion", {"red": Red, "motion": Motion})
    total = score(both(both.Config()), "sum", videos, PROMPTS)
    torch.testing.assert_close(total, red + 2 * motion)


@pytest.mark.parametrize(("frames", "shown"), [(5, [0, 1, 2, 3, 4]), (21, [0, 3, 6, 9, 11, 14, 17, 20])])
def test_people_see_frames_side_by_side_and_scores_are_of_all(tmp_path, frames, shown):
    """Of a long video eight of them, evenly spaced, with the first and the last."""
    videos = torch.arange(2 * frames, dtype=torch.uint8).view(2, frames, 1, 1, 1).expand(-1, -1, 3, 4, 6).contiguous()
    samples = Samples(videos[:, frames // 2], PROMPTS, ["train"] * 2, {}, videos=videos)
    scored = score_samples(samples, {"red": made(Red), "motion": made(Motion)}, 2)
    torch.testing.assert_close(
        scored.rewards["red"], videos[:, :, 0, 0, 0].float().mean(1) / 255 + torch.tensor([0, 1])
    )
    torch.testing.assert_close(scored.rewards["motion"], torch.full((2,), (frames - 1) / 255))
    save_images(tmp_path, {"finetuned": scored, "prior": scored}, seed=0, each=1)
    strip = np.asarray(Image.open(tmp_path / "001-dog-0-prior.webp"))
    assert strip.shape == (4, 6 * len(shown), 3)
    assert strip[0, ::6, 0].tolist() == [frames + i for i in shown]
    assert torch.equal(samples.strip(torch.tensor([[1], [0]]))[0, 0], torch.from_numpy(strip.copy()).permute(2, 0, 1))


def test_features_see_the_middle_frame():
    videos = torch.arange(2 * 5).view(2, 5, 1, 1, 1).expand(2, 5, 3, 4, 6).float()
    assert middle_frame(videos).flatten(1)[:, 0].tolist() == [2.0, 7.0]
    assert middle_frame(videos[:, 0]).shape == (2, 3, 4, 6)  # of images all
