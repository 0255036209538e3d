"""OCR: the rule on texts, and the engine on rendered ones where it is installed."""

import sys
import types

import numpy as np
import pytest
import torch
from bench.rewards.ocr import OCR, agreement, edit_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from bench.errors import BenchError
from bench.evaluation.scores import load_reward

TEXT = st.text("abc ", max_size=6)


@given(TEXT, TEXT, TEXT)
@settings(max_examples=100)
def test_the_edit_distance_is_a_distance_with_unit_steps(one, other, third):
    distance = edit_distance(one, other)
    assert distance == edit_distance(other, one) and (distance == 0) == (one == other)
    assert distance <= edit_distance(one, third) + edit_distance(third, other)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))
    assert edit_distance(one + "x", one) == 1 == edit_distance("x" + one, one)


def test_known_distances():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("flaw", "lawn"), ("", "abc"))] == [3, 2, 3]


@pytest.mark.parametrize(
    ("read", "loose", "strict"),
    [("Good Morning", 1, 1), ("GOODMORNING", 1, 1), ("Good Mornimg", 1 - 1 / 11, 1 - 1 / 11), ("", 0, 0),
     ("say good morning now", 1, 1 - 6 / 11), ("something else entirely, and long", 0, 0)],
)  # fmt: skip
def test_the_score_of_a_text(read, loose, strict):
    assert agreement(read, "Good Morning") == pytest.approx(loose)
    assert agreement(read, "Good Morning", strict=True) == pytest.approx(strict)


def rendered(*words: str) -> torch.Tensor:
    images = []
    for word in words:
        image = Image.new("RGB", (480, 160), "white")
        ImageDraw.Draw(image).text((40, 50), word, fill="black", font=ImageFont.load_default(56))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images).float() / 255


def test_without_the_engine_one_sentence(monkeypatch):
    def fails(**options: object) -> None:
        raise Exception("No available model hosting platforms detected.")

    module = types.ModuleType("paddleocr")
    module.PaddleOCR = fails
    monkeypatch.setitem(sys.modules, "paddleocr", module)
    with pytest.raises(BenchError, match=r"does not start .No available .* start it once where there is a network"):
        load_reward("ocr")
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(BenchError, match="needs PaddleOCR: pip install"):
        load_reward("ocr")


def test_rendered_words_are_read():
    """Needs PaddleOCR and its weights."""
    pytest.importorskip("paddleocr", reason="PaddleOCR is not installed: pip install 'nabla-bench[ocr]'")
    try:
        reward = load_reward("ocr")
    except BenchError as error:
        pytest.skip(str(error))
    prompts = ['a sign "OPEN"', 'a sign "Grand Opening"', 'a sign "OPEN"', "a sign"]
    reward.set_metadata({"a sign": {"text": "TAXI"}})
    scores = reward(rendered("OPEN", "Grand Opening", "", "TAXI"), prompts)
    assert scores.tolist() == [1, 1, 0, 1]
    assert OCR.words(reward, prompts[1]) == "Grand Opening"
    with pytest.raises(BenchError, match="finds no words in 'a dog'"):
        reward(rendered("OPEN"), ["a dog"])
