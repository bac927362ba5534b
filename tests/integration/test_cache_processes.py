"""What one process writes into the cache of rows, the next one finds, whatever its hash seed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from trainer.commands.data import run
from trainer.data import cache as cache_module
from trainer.data.cache import Arrays, CacheEntry, find_entry

SCRIPT = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from trainer.data.cache import find_entry
from trainer.data.encode import RowEncoder
from trainer.publish.identity import chat_template_hash, tokenizer_hash
from trainer.profiles import get_profile

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = {"encoder": RowEncoder(tokenizer, 64), "profile": get_profile("emoji_think")}
    key = find_entry(Path("cache"), "rows", parts).path.name
    found[folder.name] = [key, tokenizer_hash(tokenizer), chat_template_hash(tokenizer)]
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=3)
    assert find_entry(Path("cache"), "rows", parts).path.name == key, "a call changed the key"
json.dump(found, sys.stdout)
"""
CHATML = ["<|aaa|>", "<|im_end|>", "<|bbb|>", "<|im_start|>", "<|ccc|>", "<|ddd|>", "<|eee|>"]
LLAMA = ["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|pad_id|>", "<|fim_id|>"]
LLAMA += ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"]
PHI = ["<|aa|>", "<|end|>", "<|bb|>", "<|user|>", "<|syst|>", "<|assistant|>", "<|tool|>"]
GEMMA = ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<a_b_of_turn>"]
TOKENIZERS = {  # model, special tokens (several of one length), template, adds BOS and EOS
    "qwen": ("BPE", "Bpe", CHATML, "qwen3", False),
    "llama": ("BPE", "Bpe", LLAMA, "llama3", True),
    "phi": ("WordPiece", "WordPiece", PHI, "phi3", False),
    "gemma": ("BPE", "Bpe", GEMMA, "gemma3", True),
    "unigram": ("Unigram", "Unigram", CHATML, "qwen3", True),
}


def build(folder: Path, name: str) -> None:
    """Save one of the tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model, maker, specials, template, has_bos = TOKENIZERS[name]
    core = Tokenizer(getattr(models, model)())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = getattr(trainers, f"{maker}Trainer")(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user assistant system a b c"] * 9, trainer)
    if has_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A {specials[1]}",
            special_tokens=[(token, core.token_to_id(token)) for token in specials[:2]],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials[0] if has_bos else None,
        eos_token=specials[1],
        pad_token=specials[2],
        additional_special_tokens=specials[3:],
    )
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(folder / name)


def keys_under(seed: int, folder: Path) -> dict[str, Any]:
    """Cache key and hashes of five tokenizers, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_five_tokenizers_have_one_key_in_every_process(tmp_path: Path) -> None:
    for name in TOKENIZERS:
        build(tmp_path, name)
    one, two = keys_under(1, tmp_path), keys_under(2, tmp_path)
    assert len({key for key, _, _ in one.values()}) == 5
    assert one == two


def entry_of(folder: Path, number: int, label: str = "rows.jsonl") -> CacheEntry:
    return find_entry(folder, label, {"number": number})


def arrays() -> Arrays:
    import numpy as np

    return {"x": np.arange(3)}


def test_a_file_that_is_edited_again_and_again_does_not_fill_the_disk(tmp_path: Path) -> None:
    others = [entry_of(tmp_path, 0, "rows.json"), entry_of(tmp_path, 0, "rows.jsonl-more")]
    for other in others:
        other.store(arrays())
        os.utime(other.path, (1, 1))
    for number in range(30):
        entry = entry_of(tmp_path, number)
        entry.store(arrays())
        os.utime(entry.path, (1000 + number, 1000 + number))
        assert entry_of(tmp_path, 0).load() is not None  # used again, so that it stays
    kept = [number for number in range(30) if entry_of(tmp_path, number).path.exists()]
    assert len(kept) == cache_module.KEPT_ENTRIES
    assert kept == [0, *range(30 - cache_module.KEPT_ENTRIES + 1, 30)]
    assert all(other.load() is not None for other in others)


def test_a_full_cache_makes_room_by_last_use_and_keeps_what_others_are_writing(
    tmp_path: Path,
) -> None:
    size = 0
    for number, label in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        entry = entry_of(tmp_path, number, label)
        entry.store(arrays(), {"rows": number})
        os.utime(entry.path, (1000 + number, 1000 + number))
        size = entry.path.stat().st_size
    (tmp_path / ".x.cache.1234.tmp").write_bytes(b"being written")
    (tmp_path / ".y.cache.1234.tmp").write_bytes(b"left by a killed writer")
    os.utime(tmp_path / ".y.cache.1234.tmp", (1, 1))
    used = entry_of(tmp_path, 0, "a.jsonl").load()
    oldest = entry_of(tmp_path, 1, "b.jsonl").load()
    os.utime(entry_of(tmp_path, 1, "b.jsonl").path, (1, 1))
    last = dataclasses.replace(entry_of(tmp_path, 3, "d.jsonl"), max_bytes=3 * size + 100)
    assert last.store(arrays(), {"rows": 3}) == 1
    names = sorted(path.name[:7] for path in tmp_path.iterdir())
    assert names == [".x.cach", "a.jsonl", "c.jsonl", "d.jsonl"]
    assert used is not None
    assert oldest is not None
    assert used["x"][:].tolist() == oldest["x"][:].tolist() == [0, 1, 2], "open, so still there"
    assert cache_module.about_entry(last.path) == {"rows": 3}


def test_the_command_shows_what_entries_are_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry_of(tmp_path, 1).store(arrays(), {"data": "rows\x1b.jsonl", "rows": 3})
    (tmp_path / "old-format.cache").write_bytes(os.urandom(100))
    assert run(["cache", "show", "--dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "data rows\\x1b.jsonl, rows 3" in shown
    assert "2 entries" in shown


TWO = """
import sys
from trainer.config.data_section import DataSection
from trainer.data.dataset import prepare_data
from trainer.data.encode import RowEncoder
from trainer.models.tiny import load_tiny_tokenizer

encoder = RowEncoder(load_tiny_tokenizer(), 64)
print("ready", flush=True)
sys.stdin.readline()
data = prepare_data(DataSection(dataset_path=sys.argv[1], cache_dir=sys.argv[2]), encoder=encoder)
print(data.train.fingerprint())
"""


@pytest.mark.slow
def test_two_runs_that_prepare_the_same_rows_at_once_both_have_them(tmp_path: Path) -> None:
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    rows = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(2_000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-c", TWO, str(path), str(cache)]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(words, **options) for _ in range(2)]
    for run_of_two in runs:
        assert run_of_two.stdout is not None
        assert run_of_two.stdout.readline() == "ready\n"
    for run_of_two in runs:
        assert run_of_two.stdin is not None
        run_of_two.stdin.write("go\n")
        run_of_two.stdin.flush()
    prints = [run_of_two.communicate(timeout=300)[0] for run_of_two in runs]
    assert [run_of_two.returncode for run_of_two in runs] == [0, 0]
    assert prints[0] == prints[1]
    assert len(list(cache.iterdir())) == 1
