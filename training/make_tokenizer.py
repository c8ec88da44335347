"""Stage 0: a byte-level BPE tokenizer of Qwen's kind, trained on captions. Seconds on a CPU.

python training/make_tokenizer.py            # writes models/shapes/tokenizer
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fluxrun.shapes.captions import caption, random_scene

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
PROMPT_FORMAT = (
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # what the template makes
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# A little everyday English, so that prompts outside the captions do not fall apart into single letters.
ENGLISH = """a an the of and with in on at by for from to is are it its this that there two three some many very
small big cat dog bird horse fish tree flower house mountain river sea ocean lake sky sun moon night
day light dark city street car boat ship train plane bridge lighthouse castle forest garden beach
desert snow rain storm cloud fire water man woman child person people face portrait painting photo
photograph picture image drawing sketch watercolor oil digital art style realistic cinematic
beautiful highly detailed sharp focus soft dramatic lighting golden hour sunset sunrise dusk dawn
background old new happy sad running sitting standing flying holding looking wearing red-haired
robot dragon wizard astronaut space planet"""


def corpus(count: int) -> list[str]:
    """Captions as training words them, plus the everyday words in three spellings."""
    rng = random.Random(0)
    lines = [caption(random_scene(rng), rng) for _ in range(count)]
    lines += [case(word) for word in ENGLISH.split() for case in (str, str.title, str.upper) for _ in range(3)]
    lines += [f"a {word}" for word in ENGLISH.split() for _ in range(20)]
    return lines + [line.upper() for line in lines[: count // 5]] + [line.title() for line in lines[: count // 5]]


def train(vocab_size: int, captions: int) -> Qwen2Tokenizer:
    """The tokenizer, with chat template and padding on the right."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator([f"user\n{line}\n\n" for line in corpus(captions)], trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["merges"]]
    return Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )


@hydra.main(version_base=None, config_path="conf", config_name="tokenizer")
def main(config: DictConfig) -> None:
    tokenizer = train(config.vocab_size, config.captions)
    folder = Path(config.output) / "tokenizer"
    tokenizer.save_pretrained(folder)
    text = "a small red circle in the top left corner"
    print(f"{len(tokenizer)} tokens, {text!r} takes {len(tokenizer(text)['input_ids'])}; saved to {folder}")


if __name__ == "__main__":
    main()
