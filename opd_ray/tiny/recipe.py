"""Rebuild the packaged teacher and student from a seed: ``python -m opd_ray.tiny.recipe --out DIR --seed 0``.

Both come from one training run: the student is its first checkpoint that solves a fair share of the problems,
the teacher its last. Torch and transformers are imported here and in `pretrain`, never by the task itself.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd_ray.tiny.pretrain import MAX_TOKENS, PretrainPlan, build_model, pretrain, solution_probability
from opd_ray.tiny.task import TinyProblem, is_correct, problems
from opd_ray.tiny.tokenizer import EOS_ID, PAD_ID, build_tokenizer

logger = logging.getLogger(__name__)

TOP_P = 0.9
"""Nucleus of every measured sample; the temperature is 1."""

NUM_SAMPLES = 8
"""Samples per problem, the k of avg@k and pass@k."""

STUDENT_BAND = (0.20, 0.32)
"""The student is the first checkpoint whose probability of a worked solution lies in this band."""

_CHECK_EVERY = 10  # optimizer steps between two looks for the student
_HOPEFUL_LOSS = 0.2  # nats per token; above it no solution is right yet, and looking costs as much as a step
_MAX_NEW_TOKENS = 256
_PROBLEMS_AT_ONCE = 16


def main() -> int:
    """Train, pick, save and measure; return the process's exit code."""
    args = _parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    plan = PretrainPlan(args.steps, args.learning_rate, args.warmup_steps, args.tokens_per_batch)
    tokenizer = build_tokenizer(MAX_TOKENS)
    model = build_model(len(tokenizer), args.seed)
    logger.info("%d parameters, %s", model.num_parameters(), plan)
    student = _train(model, tokenizer, plan, args.seed)
    logger.info("trained in %.1f min", (time.monotonic() - started) / 60)
    if student is None:
        logger.error("no checkpoint in the student's band %s; train longer or at a lower rate", STUDENT_BAND)
        return 1
    save(model, args.out / "teacher")
    report("teacher", model, tokenizer)
    model.load_state_dict(student)
    save(model, args.out / "student")
    report("student", model, tokenizer)
    return 0


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write model, generation defaults and tokenizer; transformers and vLLM load the folder as it is."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=1.0, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(folder)
    # A new tokenizer: a used one keeps its last padding, and both folders shall hold the same bytes.
    build_tokenizer(MAX_TOKENS).save_pretrained(folder)


def report(name: str, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Log avg@k, pass@k and response lengths of a model on held-out problems."""
    held_out = problems("test", 64, seed=0)
    torch.manual_seed(0)
    responses = sample(model, tokenizer, held_out)
    pairs = zip(held_out, responses, strict=True)
    hits = [[is_correct(text, item.answer) for text in texts] for item, texts in pairs]
    lengths = [len(text) + 1 for texts in responses for text in texts]  # a token a character, and the end
    logger.info(
        "%s: avg@%d %.3f, pass@%d %.3f, response tokens mean %.0f max %d",
        name,
        NUM_SAMPLES,
        sum(map(sum, hits)) / (NUM_SAMPLES * len(hits)),
        NUM_SAMPLES,
        sum(map(any, hits)) / len(hits),
        sum(lengths) / len(lengths),
        max(lengths),
    )


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: list[TinyProblem]) -> list[list[str]]:
    """Sample `NUM_SAMPLES` responses to each problem, at temperature 1 and `TOP_P`."""
    model.train(False)
    responses: list[list[str]] = []
    for first in range(0, len(batch), _PROBLEMS_AT_ONCE):
        prompts = [item.problem + "\n" for item in batch[first : first + _PROBLEMS_AT_ONCE]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        output = model.generate(  # type: ignore[misc]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=_MAX_NEW_TOKENS,
            num_return_sequences=NUM_SAMPLES,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        responses.extend(texts[at : at + NUM_SAMPLES] for at in range(0, len(texts), NUM_SAMPLES))
    return responses


def _train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: PretrainPlan, seed: int
) -> dict[str, torch.Tensor] | None:
    """Train `model` into the teacher; return the student's weights, None if no checkpoint was in the band."""
    # Chosen on training problems: the held-out ones stay unseen until the report.
    rng = random.Random(seed)
    validation = problems("train", 96, seed=rng.getrandbits(32))
    student: dict[str, torch.Tensor] | None = None

    def look_for_student(step: int, loss: float) -> None:
        nonlocal student
        every = _CHECK_EVERY if student is None and loss < _HOPEFUL_LOSS else 10 * _CHECK_EVERY
        if step % every:
            return
        probability = solution_probability(model, tokenizer, validation, TOP_P)
        logger.info("step %d loss %.4f, probability of a worked solution %.3f", step, loss, probability)
        if student is None and STUDENT_BAND[0] <= probability <= STUDENT_BAND[1]:
            student = {name: value.clone() for name, value in model.state_dict().items()}
            logger.info("step %d: taken as the student", step)

    pretrain(model, tokenizer, plan, seed, look_for_student)
    return student


def _parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Rebuild the tiny teacher and student.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets teacher/ and student/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--tokens-per-batch", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2, help="torch threads; sums depend on them")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
