"""TRL's side of `bench_vs_trl`: one GKD run in TRL's own environment, told by a job file.

``PYTHON-WITH-TRL benchmarks/trl_worker.py JOB.json OUT.jsonl``

The job holds token ids, so that prompts are the other side's to the last token. OUT.jsonl gets a line when training
begins, one a step (wall clock, response tokens in the loss, seconds of generation) and one an evaluation (texts of the
samples, seconds), and a last one with versions and settings. Needs torch, transformers, datasets and trl, nothing of
this project.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found]  # in TRL's environment only
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer  # type: ignore[import-not-found]

PACKAGES = ("trl", "torch", "transformers", "accelerate", "datasets")


class Record:
    """Lines of the output file, each with its wall clock, and what the current step has counted so far."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w", buffering=1)
        self.tokens = 0
        self.padded_tokens = 0
        self.generate_s = 0.0

    def write(self, kind: str, **values: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")

    def end_step(self, step: int, loss: float | None) -> None:
        """The step's line; counts start again."""
        counts = {"tokens": self.tokens, "padded_tokens": self.padded_tokens, "generate_s": self.generate_s}
        self.write("step", step=step, loss=loss, **counts)
        self.tokens, self.padded_tokens, self.generate_s = 0, 0, 0.0


def make_trainer_class(record: Record) -> type[GKDTrainer]:
    """TRL's trainer, which also counts tokens and the time of generation."""

    class CountingTrainer(GKDTrainer):  # type: ignore[misc]  # TRL ships no types
        @staticmethod
        def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> Any:
            """As TRL does it."""
            begun = time.perf_counter()
            outputs = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
            record.generate_s += time.perf_counter() - begun
            record.tokens += int((outputs[2] != -100).sum())
            record.padded_tokens += outputs[0].numel()
            return outputs

    return CountingTrainer


class Clock(TrainerCallback):
    """Writes the lines of steps, and evaluates between them."""

    def __init__(self, record: Record, job: dict[str, Any], tokenizer: Any) -> None:
        self._record = record
        self._evaluation = job["evaluation"]
        self._num_steps = job["num_steps"]
        self._tokenizer = tokenizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation before training does not count."""
        self._evaluate(0, kwargs["model"])
        self._record.write("begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything since the last line was this step, data and optimizer included."""
        step = int(state.global_step)
        self._record.end_step(step, state.log_history[-1].get("loss") if state.log_history else None)
        if self._evaluation is not None and (step % self._evaluation["every"] == 0 or step == self._num_steps):
            self._evaluate(step, kwargs["model"])

    def _evaluate(self, step: int, model: Any) -> None:
        if self._evaluation is None:
            return
        begun = time.perf_counter()
        generator_state = torch.get_rng_state()
        was_training = model.training
        model.eval()
        torch.manual_seed(self._evaluation["seed"])
        completions = sample(model, self._tokenizer, self._evaluation)
        model.train(was_training)
        torch.set_rng_state(generator_state)
        self._record.write("evaluation", step=step, wall_s=time.perf_counter() - begun, completions=completions)


def sample(model: Any, tokenizer: Any, what: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """`samples` completions of each prompt: text, tokens, why it ended."""
    prompts: list[list[int]] = what["prompts"]
    width, samples = max(map(len, prompts)), what["samples"]
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=what["temperature"],
        top_p=what["top_p"],
        top_k=0,
        max_new_tokens=what["max_new_tokens"],
        num_return_sequences=samples,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad,
    )
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = {tokenizer.eos_token_id}
    completions = []
    for row in found:
        length = next((place for place, token in enumerate(row) if token in ends), None)
        kept = row if length is None else row[:length]
        completions.append(
            {
                "text": tokenizer.decode(kept, skip_special_tokens=True),
                "num_tokens": len(kept) + (length is not None),
                "finish_reason": "length" if length is None else "stop",
            }
        )
    return [completions[i : i + samples] for i in range(0, len(completions), samples)]


def settings(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """TRL's settings: the shared ones from the job, the rest what is fastest on a CPU."""
    return {
        "output_dir": str(folder),
        "lmbda": 1.0,
        "beta": 1.0,
        "seq_kd": False,
        "temperature": job["temperature"],
        "max_new_tokens": job["max_new_tokens"],
        "max_length": job["max_length"],
        "max_steps": job["num_steps"],
        "per_device_train_batch_size": job["batch"] // job["accumulation"],
        "gradient_accumulation_steps": job["accumulation"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": job["lr_schedule"],
        "warmup_steps": job["warmup_steps"],
        "weight_decay": job["weight_decay"],
        "adam_beta2": job["beta2"],
        "max_grad_norm": job["grad_clip"],
        "seed": job["seed"],
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def main() -> None:
    """Reads the job, trains, and writes the lines."""
    job_file, out_file = map(Path, sys.argv[1:3])
    job: dict[str, Any] = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    record = Record(out_file)
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    models = [AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32) for name in ("student", "teacher")]
    said = settings(job, out_file.parent / "trl")
    # The collator takes ids as they are; `prompt` is only looked for, and the boundary is the mask's.
    rows = [
        {
            "prompt": "",
            "input_ids": row["prompt"] + row["response"],
            "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["response"]),
        }
        for row in job["rows"]
    ]
    trainer = make_trainer_class(record)(
        model=models[0],
        teacher_model=models[1],
        args=GKDConfig(**said),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock(record, job, tokenizer)],
    )
    trainer.train()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    said.pop("output_dir")
    record.write(
        "end",
        versions=versions,
        settings=said | {"torch_threads": torch.get_num_threads(), "attention": models[0].config._attn_implementation},
        environment={name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ},
    )


if __name__ == "__main__":
    main()
