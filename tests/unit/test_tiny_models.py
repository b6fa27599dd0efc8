"""The packaged tiny models: small, loadable, one tokenizer, and good at what they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from opd_ray.tiny.paths import student_path, teacher_path  # noqa: E402
from opd_ray.tiny.pretrain import encode_batch, response_logprobs, solution_probability  # noqa: E402
from opd_ray.tiny.task import CHARACTERS, problems  # noqa: E402
from opd_ray.tiny.tokenizer import EOS_ID, PAD_ID, build_tokenizer  # noqa: E402

FOLDERS = pytest.mark.parametrize("folder", [teacher_path(), student_path()], ids=["teacher", "student"])
TOKENIZER = build_tokenizer(512)


@settings(deadline=None)
@given(st.text(alphabet=CHARACTERS))
def test_tokenizer_returns_the_text_it_was_given(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)  # a token a character, nothing added in front or behind
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, EOS_ID, PAD_ID], skip_special_tokens=True) == text


def test_unknown_characters_do_not_vanish() -> None:
    assert len(TOKENIZER.encode("1?2")) == 3


def test_both_packaged_tokenizers_are_the_built_one() -> None:
    for folder in (teacher_path(), student_path()):
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert (loaded.eos_token_id, loaded.pad_token_id) == (EOS_ID, PAD_ID)
        text = problems("train", 1, 0)[0].solution
        assert loaded(text)["input_ids"] == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    names = ("tokenizer.json", "tokenizer_config.json")
    assert all((teacher_path() / name).read_bytes() == (student_path() / name).read_bytes() for name in names)


@FOLDERS
def test_packaged_models_are_small_and_complete(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 1_000_000
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(TOKENIZER)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (EOS_ID, PAD_ID)
    assert model.generation_config.eos_token_id == EOS_ID


def test_packaged_models_take_less_than_five_megabytes() -> None:
    files = [path for folder in (teacher_path(), student_path()) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000


def test_teacher_solves_what_the_student_often_does_not() -> None:
    held_out = problems("test", 48, 3)
    chance = {}
    for folder in (teacher_path(), student_path()):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        chance[folder.name] = solution_probability(model, TOKENIZER, held_out, top_p=0.9)
    assert chance["teacher"] > 0.9
    assert 0.1 < chance["student"] < 0.45


def test_nucleus_logprobs_drop_the_tail_and_renormalise() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(student_path())
    input_ids, labels = encode_batch(problems("test", 2, 0), TOKENIZER)
    with torch.no_grad():
        plain = response_logprobs(model, input_ids, labels)
        nucleus = response_logprobs(model, input_ids, labels, top_p=0.9)
    kept = torch.isfinite(nucleus)
    assert bool((nucleus[kept] >= plain[kept] - 1e-6).all())
    assert float(nucleus.max()) <= 0.0
    assert plain.shape == labels[:, 1:].shape
