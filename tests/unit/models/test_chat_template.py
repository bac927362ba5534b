"""Base models without a chat template get a named one; the user's choice wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.training_sections import ModelSection
from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError
from trainer.models.chat_template import set_chat_template
from trainer.models.load import load_tokenizer

ROW: list[Any] = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "the fox"},
]


def trained_text(tokenizer: Any) -> str:
    example = RowEncoder(tokenizer, 128).encode(ROW)
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]))


@pytest.fixture
def base_folder(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> str:
    make_tokenizer(None, eos="<|endoftext|>").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_base_model_that_knows_the_tokens_gets_chatml_and_the_card_says_so(
    base_folder: str,
) -> None:
    tokenizer = load_tokenizer(ModelSection(model_path=base_folder))
    assert trained_text(tokenizer) == "the fox<|im_end|>"
    assert "`chatml`, because the model has none" in RowEncoder(tokenizer, 64).template.source


def test_the_chosen_template_wins_and_is_saved_with_the_tokenizer(
    base_folder: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(ModelSection(model_path=base_folder, chat_template="plain"))
    assert trained_text(tokenizer) == " the fox<|endoftext|>"
    text = tokenizer.apply_chat_template(ROW, tokenize=False)
    assert text == "System: short\nUser: hi\nAssistant: the fox<|endoftext|>\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(ModelSection(model_path=str(tmp_path / "saved")))
    assert again.apply_chat_template(ROW, tokenize=False) == text


def test_a_file_is_taken_as_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = load_tokenizer(ModelSection(model_path="tiny", chat_template=str(file)))
    assert trained_text(tokenizer) == "the fox<|im_end|>"
    assert str(file) in RowEncoder(tokenizer, 64).template.source


def test_a_tokenizer_that_adds_bos_gets_exactly_one(make_tokenizer: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None, eos="<|endoftext|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    for choice in ("chatml", "plain"):
        set_chat_template(tokenizer, choice)
        ids = RowEncoder(tokenizer, 128).encode(ROW).input_ids
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_without_the_tokens_of_chatml_plain_is_the_default(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(None, eos="<|endoftext|>")
    tokenizer.get_vocab = lambda: {"a": 0}
    set_chat_template(tokenizer, None)
    assert tokenizer.template_origin == "`plain`, because the model has none"
    with pytest.raises(ConfigError, match="use plain"):
        set_chat_template(tokenizer, "chatml")


def test_a_missing_template_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(ModelSection(model_path="tiny", chat_template="./nowhere.jinja"))
