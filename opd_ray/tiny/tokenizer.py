"""The character tokenizer of the tiny models: a token a character, no special tokens added on its own."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_ray.tiny.task import CHARACTERS

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
PAD_ID, EOS_ID = 0, 1


def build_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a model with a context of `max_tokens`; ids 0 and 1 are `<pad>` and `<eos>`."""
    vocab = {token: index for index, token in enumerate((PAD_TOKEN, EOS_TOKEN, UNK_TOKEN, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK_TOKEN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()  # without a decoder the characters would come back joined by spaces
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
