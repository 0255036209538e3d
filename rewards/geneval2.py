"""GenEval 2: questions about the image that its prompt answers, asked of a vision-language model (Soft-TIFA)."""

import json
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench import Config, Reward
from bench.errors import BenchError
from bench.hub import Repository
from bench.models.vision_language import READER, Reader, reader_dtype

SHARDS = tuple(f"model-{number:05}-of-00004.safetensors" for number in range(1, 5))
WEIGHTS = Repository(
    "Qwen/Qwen3-VL-8B-Instruct",
    (*READER, "model.safetensors.index.json", *SHARDS),
    size=17_550_000_000,
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class GenEval2Config(Config):
    """How the answers come together."""

    EXECUTION = ("batch",)

    mean: Literal["geometric", "arithmetic"] = Field("geometric", description="of the answers' probabilities")
    batch: int = Field(8, ge=1, description="questions that the network answers at a time")


class GenEval2(Reward):
    """The mean probability that Qwen3-VL-8B gives the right answers to the prompt's questions about the image.

    The questions are the column `atoms` of the prompt file: JSON, a list of [question, answer]. A question is asked
    alone, with "Answer in one word."; its probability is that of the first tokens with which the answer can begin, each
    counted once, before any rule of generation. Questions "How many …" have a number as answer, all others "yes".
    """

    Config = GenEval2Config
    config: GenEval2Config

    scale = "probability, 0 to 1"
    source = "Kamath et al. (2025), arXiv:2512.16853; Qwen/Qwen3-VL-8B-Instruct"
    suite = "sd35-geneval2"
    files = (WEIGHTS,)
    columns = ("atoms",)

    def __init__(self, config: GenEval2Config, device: torch.device | str = "cpu"):
        from transformers import Qwen3VLForConditionalGeneration  # takes seconds

        super().__init__(config, device)
        self.reader = Reader(WEIGHTS.path())
        network = Qwen3VLForConditionalGeneration.from_pretrained(
            WEIGHTS.path(), dtype=reader_dtype(self.device), local_files_only=True
        )
        self.network = network.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        atoms = [self._atoms(prompt) for prompt in prompts]
        rows = [(row, *atom) for row, several in enumerate(atoms) for atom in several]
        parts = [
            self._log_probabilities(images, rows[i : i + self.config.batch])
            for i in range(0, len(rows), self.config.batch)
        ]
        each = torch.cat(parts).split([len(several) for several in atoms])
        if self.config.mean == "geometric":
            return torch.stack([one.mean().exp() for one in each])
        return torch.stack([one.exp().mean() for one in each])

    def _atoms(self, prompt: str) -> list[tuple[str, str]]:
        """The prompt's questions and answers. Raises BenchError if there are none, or they cannot be read."""
        try:
            atoms = [(question, answer) for question, answer in json.loads(self.column("atoms", prompt))]
            for question, answer in atoms:
                answer_forms(question, answer)
            if not atoms:
                raise ValueError("there are none")
        except (ValueError, TypeError, AttributeError) as error:
            raise BenchError(
                f'the column atoms of {prompt!r} is no list like [["Is the dog red?", "yes"], ["How many dogs are '
                f'there?", "two"]]: {error}.'
            ) from None
        return atoms

    def _log_probabilities(self, images: Tensor, rows: list[tuple[int, str, str]]) -> Tensor:
        """Log-probabilities [n] of the right answers to rows (image, question, answer)."""
        chosen = torch.tensor([row for row, *_ in rows], device=images.device)
        inputs = self.reader(images[chosen], [f"{question} Answer in one word." for _, question, _ in rows])
        states = self.network.model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        logits = self.network.lm_head(states[torch.arange(len(rows), device=images.device), last]).float()
        found = logits.log_softmax(1)
        right = torch.zeros(found.shape, dtype=torch.bool)
        for place, (_, question, answer) in enumerate(rows):
            right[place, first_tokens(self.reader, question, answer)] = True
        return found.masked_fill(~right.to(images.device), -torch.inf).logsumexp(1)


def answer_forms(question: str, answer: str) -> list[str]:
    """How a right answer can be written. Raises ValueError for an answer that the benchmark does not know."""
    if question.startswith("How many"):
        if answer.lower() not in NUMBERS:
            raise ValueError(f"{question!r} is answered by a number from zero to ten, not {answer!r}")
        words = [answer, answer.capitalize(), str(NUMBERS.index(answer.lower()))]
    elif answer.lower() != "yes":
        raise ValueError(f"{question!r} is answered by yes, not {answer!r}")
    else:
        words = ["Yes", "yes"]
    return [space + word for space in ("", " ") for word in words]


def first_tokens(reader: Reader, question: str, answer: str) -> list[int]:
    """The tokens with which the answer can begin, each once."""
    return sorted(
        {reader.tokenizer.encode(form, add_special_tokens=False)[0] for form in answer_forms(question, answer)}
    )
