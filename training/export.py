"""Write the trained models as two ordinary Hugging Face checkpoints that transformers loads.

python training/export.py       # build/demo/checkpoint.pt -> folospec/demo_models/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import corpus
import torch
import train
from transformers import GenerationConfig, PreTrainedTokenizerFast

NAMES = {"target": "folospec-demo", "draft": "folospec-demo-draft"}
# The models know code, not conversations: what people say becomes a comment, the answer is code.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ '# ' + message['content'] | trim | replace('\\n', '\\n# ') + '\\n' }}{% endif %}"
    "{% endfor %}"
)


def load_tokenizer(tokenizer_file: Path) -> PreTrainedTokenizerFast:
    """Wrap the byte-level BPE; its one special token ends a document and never begins one."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        eos_token=corpus.END_OF_TEXT,
        pad_token=corpus.END_OF_TEXT,
        model_max_length=train.LONG_WINDOW,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def export(checkpoint: Path, tokenizer_file: Path, output: Path) -> None:
    """Write `output`/folospec-demo and `output`/folospec-demo-draft, weights in bfloat16.

    Raises:
        ValueError: the tokenizer's end-of-text token is not the one that the models' configs name.
    """
    models = train.make_models()
    models.load_state_dict(torch.load(checkpoint, map_location="cpu", mmap=True)["models"])
    tokenizer = load_tokenizer(tokenizer_file)
    for key, name in NAMES.items():
        model = models[key].to(torch.bfloat16)
        eos = model.config.eos_token_id
        if tokenizer.eos_token_id != eos:
            raise ValueError(
                f"token {corpus.END_OF_TEXT} must be {eos}, got {tokenizer.eos_token_id}"
            )
        model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name, save_jinja_files=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="where train.py wrote"
    )
    parser.add_argument("--output", type=Path, default=Path("folospec/demo_models"))
    args = parser.parse_args()
    export(args.work / "checkpoint.pt", args.work / "tokenizer.json", args.output)


if __name__ == "__main__":
    main()
