"""How the tiny model's tokenizer was made.

`python -m trainer.models.make_tiny_tokenizer` writes it anew.

A byte-level BPE trained on the demo's own rows, so that their words are one token each. All 256
bytes are in the vocabulary: any text can be encoded, and decoding gives it back exactly.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.models.chat_template import CHATML
from trainer.models.tiny import DEMO_SYSTEM_PROMPT, TINY_TOKENIZER_DIR, make_tasks
from trainer.profiles.profile import ANS_END, ANS_START

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

MAX_VOCAB_SIZE = 512
"""Not reached: the BPE stops by itself when each word of the rows is one token."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; every call gives the same one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _training_texts(),
        trainers.BpeTrainer(
            vocab_size=MAX_VOCAB_SIZE,
            min_frequency=2,
            special_tokens=[END_OF_TEXT, IM_START, IM_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Not special: they are part of the answer and must survive skip_special_tokens=True.
    core.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in (ANS_START, ANS_END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHATML,
    )


def save_tokenizer(folder: Path) -> None:
    """Make the tokenizer and write its files into a folder."""
    make_tokenizer().save_pretrained(str(folder))


def _training_texts() -> list[str]:
    """Turns as they stand in rows. The pieces between special tokens are texts of their own."""
    train, _ = make_tasks(num_train_rows=500, num_validation_rows=5, seed=0)
    return [
        text
        for task in train
        for role, content in (
            ("system", DEMO_SYSTEM_PROMPT),
            ("user", task.question),
            ("assistant", f" {task.answer} "),
        )
        for text in (f"{role}\n", content)
    ]


if __name__ == "__main__":
    save_tokenizer(TINY_TOKENIZER_DIR)
    print(f"{TINY_TOKENIZER_DIR}: {len(make_tokenizer())} tokens")
