"""Effects of sections model, data and profile."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch

from tests.trust import flash
from tests.trust.effects import shows
from tests.trust.lab import BATCH_SIZE, LORA, NUM_ROWS, NUM_STEPS, Lab
from tests.trust.reference import llama
from trainer.core import TrainerEngine
from trainer.data import encode_processes
from trainer.models.adapter_files import load_finished_model


def sample(data: Any) -> str:
    return "".join(text for text, _ in data.card.sample)


# ---- model


@shows("model.model_path")
def model_path(lab: Lab) -> None:
    folder = lab.path("wider")
    llama(vocab_size=len(lab.tokenizer), intermediate_size=32).save_pretrained(folder)
    lab.tokenizer.save_pretrained(folder)
    seen = lab.run(model={"model_path": str(folder)}, hyperparams={"max_steps": 1})
    assert seen.tensors["model.layers.0.mlp.up_proj.weight"].shape[0] == 32


@shows("model.revision")
def revision(lab: Lab) -> None:
    """A branch of a hub model, from the hub's own cache; anything else has no versions."""
    import huggingface_hub.constants as constants

    cache = lab.path("hub")
    repository = cache / "models--somebody--small"
    for number, name in enumerate(("main", "wide")):
        commit = str(number) * 40
        snapshot = repository / "snapshots" / commit
        llama(vocab_size=len(lab.tokenizer), intermediate_size=32 * (1 + number)).save_pretrained(
            snapshot
        )
        lab.tokenizer.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    with mock.patch.object(constants, "HF_HUB_CACHE", str(cache)):
        for asked, width in ((None, 32), ("wide", 64)):
            trainer = lab.trainer(model={"model_path": "somebody/small", "revision": asked})
            assert trainer.model.config.intermediate_size == width
    assert "model.revision='wide'" in lab.refusal(model={"revision": "wide"})


@shows("model.attn_implementation")
def attn_implementation(lab: Lab) -> None:
    for name in ("eager", "sdpa"):
        model = lab.trainer(model={"attn_implementation": name}).model
        assert model.config._attn_implementation == name
    with flash.installed() as calls:
        seen = lab.run(model={"attn_implementation": "flash_attention_2"})
        assert calls.varlen
    manifest = json.loads((seen.folder / "run.json").read_text())
    assert manifest["attention"] == "flash_attention_2, as configured"
    assert "flex_attention" in lab.refusal(model={"attn_implementation": "flex_attention"})
    assert "a/b" in lab.refusal(model={"attn_implementation": "a/b"})


@shows("model.chat_template")
def chat_template(lab: Lab) -> None:
    assert "\nAssistant: " in sample(lab.data(model={"chat_template": "plain"}))
    assert "Assistant: " not in sample(lab.data())


@shows("model.add_tokens")
def add_tokens(lab: Lab) -> None:
    plain, added = lab.data(), lab.data(model={"add_tokens": ["it is"]})
    assert added.card.num_tokens < plain.card.num_tokens
    check_rows_of_adapters(lab)


def check_rows_of_adapters(lab: Lab) -> None:
    """Beside adapters the rows of the new tokens are trained, in embedding and head; no others."""
    seen = lab.run(model={"add_tokens": ["it is", "<<x>>"]}, hyperparams=LORA)
    rows = {name: value for name, value in seen.tensors.items() if "trainable_tokens" in name}
    assert len(rows) == 2
    base = load_finished_model(lab.model).eval()
    model = load_finished_model(seen.folder / "final_model").get_base_model()
    new = list(range(len(lab.tokenizer), len(lab.tokenizer) + 2))
    for end in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(base, end)().weight, getattr(model, end)().weight
        assert len(after) == len(lab.tokenizer) + 2
        assert torch.equal(after[: new[0]], before)
        moved = (after[new] - before.mean(dim=0)).detach()
        assert any(torch.equal(after[new], value) for value in rows.values())
        assert float(moved[0].abs().max()) > 1e-3, "a token of the answers"


@shows("model.trust_remote_code")
def trust_remote_code(lab: Lab) -> None:
    """A folder with code of its own: refused, and run when the user says so."""
    folder = lab.path("own_code")
    llama(vocab_size=len(lab.tokenizer)).save_pretrained(folder)
    lab.tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps(config))
    assert "trust_remote_code" in lab.refusal(model={"model_path": str(folder)})
    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(lab.path("code"))):
        trainer = lab.trainer(model={"model_path": str(folder), "trust_remote_code": True})
    assert type(trainer.model).__name__ == "OwnModel"


# ---- data


@shows("data.dataset_path", "data.weights")
def dataset_path(lab: Lab) -> None:
    other = lab.write([{"question": f"{n}", "answer": "yes"} for n in range(10)])
    none = {"validation_split": 0}
    assert lab.data(data={"dataset_path": str(other), **none}).card.num_train_rows == 10
    both = {"dataset_path": f"{lab.file},{other}", **none}
    assert lab.data(data=both).card.num_train_rows == NUM_ROWS + 10
    weighted = lab.data(data={**both, "weights": [0.5, 4]})
    assert weighted.card.num_train_rows == NUM_ROWS / 2 + 40


@shows("data.mix_probabilities", "data.mix_epoch")
def mix_probabilities(lab: Lab) -> None:
    other = lab.write([{"question": f"{n}", "answer": "yes"} for n in range(10)])
    both = {"dataset_path": f"{lab.file},{other}", "validation_split": 0}
    for ends_with, times in (("first", 1), ("longest", 4)):
        mixed = {**both, "mix_probabilities": [0.5, 0.5], "mix_epoch": ends_with}
        trainer = lab.trainer(data=mixed)
        rows = list(trainer.order)
        assert len(rows) == 20 * times
        assert sum(row >= NUM_ROWS for row in rows) == 10 * times
    told = lab.refusal(data={**both, "mix_probabilities": [0.2, 0.3, 0.5]})
    assert "data.mix_probabilities has 3 numbers" in told
    assert "1 as their sum" in lab.refusal(data={**both, "mix_probabilities": [0.5, 0.6]})


@shows("data.format")
def data_format(lab: Lab) -> None:
    rows = [{"text": f"plain {n}", "question": "why?", "answer": f"so {n}"} for n in range(9)]
    path = str(lab.write(rows))
    for name, said in (("auto", "why?"), ("question_answer", "why?"), ("text", "plain")):
        assert said in sample(lab.data(data={"dataset_path": path, "format": name}))
    assert "data.format says" in lab.refusal(data={"format": "alpaca"})


@shows("data.text_markers")
def text_markers(lab: Lab) -> None:
    text = "<|im_start|>user\n{}?<|im_end|>\n<|im_start|>assistant\nja {}<|im_end|>\n"
    path = str(lab.write([{"text": text.format(n, n)} for n in range(9)]))
    trained = {
        how: lab.data(data={"dataset_path": path, "text_markers": how}).card.num_trained_tokens
        for how in ("turns", "tokens")
    }
    assert 0 < trained["turns"] < trained["tokens"] / 2
    assert "holds a control token" in lab.refusal(data={"text_markers": "tokens"})


@shows("data.columns")
def columns(lab: Lab) -> None:
    path = str(lab.write([{"frage": f"{n}?", "antwort": f"ja {n}"} for n in range(9)]))
    named = {"question": "frage", "answer": "antwort"}
    assert "ja" in sample(lab.data(data={"dataset_path": path, "columns": named}))
    assert "frage" in lab.refusal(data={"dataset_path": path})


@shows("data.validation_path", "data.validation_split")
def validation(lab: Lab) -> None:
    other = lab.write([{"question": f"{n}", "answer": "yes"} for n in range(7)])
    data = lab.data(data={"validation_path": str(other)})
    assert (data.card.num_train_rows, len(data.validation or ())) == (NUM_ROWS, 7)
    for share in (0.0, 0.5):
        assert lab.data(data={"validation_split": share}).card.num_validation_rows == int(
            share * NUM_ROWS
        )


@shows("data.max_rows")
def max_rows(lab: Lab) -> None:
    assert lab.data(data={"max_rows": 9}).card.num_rows == 9


@shows("data.on_bad_row", "data.max_bad_rows")
def on_bad_row(lab: Lab) -> None:
    path = str(lab.write([*lab.rows, "{broken", {"question": "?", "answer": ""}]))
    data = {"dataset_path": path}
    assert f"{path}:{NUM_ROWS + 1}: " in lab.refusal(data=data)
    skip = {**data, "on_bad_row": "skip"}
    assert lab.data(data=skip).card.num_rejected == 2
    assert lab.data(data={**skip, "max_bad_rows": 2}).card.num_rejected == 2
    assert "data.max_bad_rows=1" in lab.refusal(data={**skip, "max_bad_rows": 1})


@shows("data.cache", "data.cache_dir")
def cache(lab: Lab) -> None:
    folder = lab.path("cache")
    kept = {"cache": True, "cache_dir": str(folder)}
    assert lab.data(data=kept).card.cache.startswith(f"written to {folder}")
    [entry] = folder.iterdir()
    assert lab.data(data=kept).card.cache == f"read from {entry}"
    assert "off" in lab.data(data={**kept, "cache": False}).card.cache


@shows("data.truncation")
def truncation(lab: Lab) -> None:
    short = {"max_length": 40}
    cards = {
        how: lab.data(hyperparams=short, data={"truncation": how}).card
        for how in ("keep_start", "keep_end", "drop")
    }
    assert cards["keep_start"].num_without_stop == 0 < cards["keep_start"].num_truncated
    assert cards["keep_end"].num_truncated == cards["drop"].num_dropped > 0
    message = lab.refusal(hyperparams=short, data={"truncation": "error"})
    assert "hyperparams.max_length is 40" in message
    text = {"dataset_path": str(lab.write([{"text": f"{n} " * 60} for n in range(12)]))}
    split, cut = (
        lab.data(hyperparams=short, data={**text, "truncation": how})
        for how in ("split", "keep_start")
    )
    assert (split.card.num_split, split.card.num_cut_tokens) == (12, 0)
    assert len(split.train) > len(cut.train)
    assert split.card.num_trained_tokens > cut.card.num_trained_tokens
    assert "cuts plain text" in lab.refusal(hyperparams=short, data={"truncation": "split"})


@shows("data.train_on_thinking")
def train_on_thinking(lab: Lab) -> None:
    def turns(n: int) -> list[dict[str, str]]:
        answer = {"role": "assistant", "content": f"so {n}", "reasoning_content": f"since {n}"}
        return [{"role": "user", "content": f"why {n}?"}, answer]

    path = str(lab.write([{"messages": turns(n)} for n in range(9)]))
    for is_trained, start in ((True, "<think>\nsince"), (False, "so ")):
        data = lab.data(data={"dataset_path": path, "train_on_thinking": is_trained})
        trained = "".join(text for text, is_on in data.card.sample if is_on)
        assert trained.startswith(start)
    assert "train_on_thinking" in lab.refusal(data={"train_on_thinking": False})


@shows("data.cache_max_gib")
def cache_size(lab: Lab) -> None:
    """What does not fit is not written; what is there makes room for what is written."""
    folder = lab.path("small_cache")
    kept = {"cache": True, "cache_dir": str(folder)}
    tiny = lab.data(data={**kept, "cache_max_gib": 1e-9})
    assert "data.cache_max_gib is less" in tiny.card.cache
    lab.data(data=kept)
    [entry] = folder.iterdir()
    room = 1.5 * entry.stat().st_size / 2**30
    other = lab.data(data={**kept, "cache_max_gib": room, "validation_split": 0.3})
    assert "1 older entry removed" in other.card.cache
    assert len([*folder.iterdir()]) == 1


@shows("data.encode_processes")
def encoding_processes(lab: Lab) -> None:
    """Two processes are started, and make the same rows."""
    started: list[Any] = []
    original = encode_processes.Child

    def start(*args: Any, **options: Any) -> Any:
        started.append(original(*args, **options))
        return started[-1]

    with mock.patch.object(encode_processes, "Child", start):
        two = lab.data(data={"encode_processes": 2, "cache": False})
        assert len(started) == 2
        one = lab.data(data={"encode_processes": 1, "cache": False})
        assert len(started) == 2
    assert one.train.fingerprint() == two.train.fingerprint()


@shows("data.shuffle", "data.group_by_length")
def order(lab: Lab) -> None:
    size = 30
    plain = lab.trainer(data={"shuffle": False, "group_by_length": False}).order
    assert plain.epoch_rows(0) == list(range(size))
    mixed = lab.trainer(data={"group_by_length": False}).order
    assert sorted(mixed.epoch_rows(0)) == plain.epoch_rows(0) != mixed.epoch_rows(0)
    assert mixed.epoch_rows(0) != mixed.epoch_rows(1)

    def padding(found: Any) -> int:
        rows = [found.lengths[i] for i in found.epoch_rows(0)]
        groups = [rows[i : i + found.group_size] for i in range(0, size, found.group_size)]
        return sum(max(group) * len(group) - sum(group) for group in groups)

    assert padding(lab.trainer().order) < padding(mixed) / 2


@shows("data.streaming", "data.shuffle_buffer")
def streaming(lab: Lab) -> None:
    """Training begins once the buffer is read, and rows move by less than the buffer."""
    file = lab.write([{"question": f"what is {n}?", "answer": f"{n}"} for n in range(3000)])
    data = {"streaming": True, "shuffle_buffer": 300, "dataset_path": str(file)}
    few = {**data, "validation_split": 0, "group_by_length": False}
    read = lab.data(data=few)
    assert 300 <= read.card.num_rows < 300 + encode_processes.PIECE
    for size, least in ((300, 100), (2, 0)):
        engine = TrainerEngine()
        order = engine.create_trainer(lab.config(data={**few, "shuffle_buffer": size})).order
        assert least < max(order) < size + NUM_STEPS * BATCH_SIZE
        engine.close()
    record = json.loads((lab.run(data=data).folder / "run.json").read_text())
    assert record["stream"]["number"] > 0
    assert "all rows are shuffled together" in lab.refusal(data={"shuffle_buffer": 4})


@shows("data.enable_packing")
def enable_packing(lab: Lab) -> None:
    trainer = lab.trainer(data={"enable_packing": True}, hyperparams={"max_length": 200})
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 1).sum() > len(batch["input_ids"])
    assert "attention_mask" not in batch


# ---- profile


@shows("profile.name", "profile.system_prompt")
def profile(lab: Lab) -> None:
    marked = sample(lab.data(profile={"name": "regime3", "system_prompt": "Be kind."}))
    assert "<<ANS_START>>" in marked
    assert "Be kind." in marked
    assert "<<ANS_START>>" not in sample(lab.data())


@shows("profile.options")
def profile_options(lab: Lab) -> None:
    named, long = {"name": "emoji_think"}, {"max_length": 512}
    framed = lab.data(profile=named, hyperparams=long)
    assert "rows left direct" not in framed.card.profile_report
    options = {"direct_share": 1.0}
    direct = lab.data(profile={**named, "options": options}, hyperparams=long)
    assert direct.card.profile_report.get("rows left direct") == NUM_ROWS
