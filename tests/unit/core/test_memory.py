"""The memory card against what real steps allocate, and what a dry run proposes."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from benchmarks import memory_card
from trainer.config.training_sections import Hyperparams, LoraSection
from trainer.core import dry_run, fake_step, memory, tiles
from trainer.core.dry_run import find_fit, mode_needs
from trainer.core.loss import supervised_loss
from trainer.core.memory import MemorySetup, device_memory, estimate_memory, fits
from trainer.core.optim import build_optimizer
from trainer.core.sharding import gathered_bytes
from trainer.core.tiles import PostHead, Tiling
from trainer.models.adapters import add_lora
from trainer.publish import snapshot

VOCABULARY, BATCH_SIZE, LENGTH = 512, 2, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
FAMILIES: dict[str, Any] = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "llama": LlamaConfig(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=5, n_head=4),
    "moe": Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}
SETUP = MemorySetup(
    compute_dtype=torch.float32, batch_size=BATCH_SIZE, length=LENGTH, device_type="cpu"
)


def real_model(config: Any, setup: MemorySetup) -> Any:
    mixed = setup.compute_dtype != torch.float32
    is_lora = setup.training_mode == "lora"
    torch.manual_seed(0)
    dtype = setup.compute_dtype if is_lora else torch.float32
    options = {"attn_implementation": "eager"} if setup.attention == "eager" else {}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **options)
    if setup.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    if is_lora:
        model = add_lora(model, LoraSection(), seed=0)
        if setup.gradient_checkpointing:
            model.enable_input_require_grads()
    if mixed:  # as accelerate does
        autocast = torch.autocast("cpu", dtype=setup.compute_dtype)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
    return model.train()


def allocated_by_a_step(config: Any, setup: MemorySetup) -> int:
    """Peak of the allocator's bytes over those before the second step, by torch's profiler."""
    model = real_model(config, setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(0, VOCABULARY, (BATCH_SIZE, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    tiling = Tiling.of(PostHead(), VOCABULARY, "cpu")

    def step() -> None:
        for _ in range(setup.gradient_accumulation):
            supervised_loss(model, model, batch, 1, tiling=tiling).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    # What earlier tests left in cycles would be counted as freed by this step.
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step()
    finally:
        gc.enable()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


CASES = list(
    itertools.product(
        FAMILIES, ("full", "lora"), (torch.float32, torch.bfloat16), (False, True), (1, 2)
    )
)
SHORT = [
    ("qwen3", "full", torch.bfloat16, False, 1),
    ("qwen3", "full", torch.bfloat16, True, 2),
    ("llama", "lora", torch.bfloat16, True, 1),
    ("gemma3", "full", torch.float32, True, 1),
    ("gpt2", "lora", torch.float32, False, 2),
    ("moe", "full", torch.bfloat16, False, 2),
]


def check_step(family: str, mode: str, dtype: torch.dtype, is_on: bool, num: int) -> None:
    setup = dataclasses.replace(
        SETUP,
        training_mode=mode,
        compute_dtype=dtype,
        gradient_checkpointing=is_on,
        gradient_accumulation=num,
    )
    card = estimate_memory(FAMILIES[family], setup)
    real = allocated_by_a_step(FAMILIES[family], setup)
    assert card.is_counted
    assert card.step == pytest.approx(real, rel=0.10 if is_on else 0.01)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: "-".join(map(str, case)))
def test_the_step_of_the_card_is_what_a_real_step_allocates(case: Any) -> None:
    check_step(*case)


@pytest.mark.parametrize(
    "case", [SHORT[0], SHORT[2], SHORT[4]], ids=lambda case: "-".join(map(str, case))
)
def test_the_card_knows_the_loss_in_tiles(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_estimate_of", memory._estimate_of.__wrapped__)
    whole = estimate_memory(FAMILIES[case[0]], SETUP)
    monkeypatch.setattr(tiles, "TILE_LOGITS", 13 * VOCABULARY)
    assert estimate_memory(FAMILIES[case[0]], SETUP).loss < 0.6 * whole.loss
    check_step(*case)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_step_of_the_card_is_right_for_all_families_and_modes(case: Any) -> None:
    check_step(*case)


def test_eager_attention_keeps_its_matrix() -> None:
    setup = dataclasses.replace(SETUP, attention="eager")
    card = estimate_memory(FAMILIES["llama"], setup)
    assert card.step == pytest.approx(allocated_by_a_step(FAMILIES["llama"], setup), rel=0.01)
    plain = estimate_memory(FAMILIES["llama"], SETUP)
    matrices = 5 * 4 * BATCH_SIZE * LENGTH**2 * 4
    assert card.activations > plain.activations + matrices / 2


@pytest.mark.parametrize(("family", "mode"), [("gemma3", "full"), ("qwen3", "qlora")])
def test_blocks_that_are_not_run_are_added_up_exactly(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = dataclasses.replace(SETUP, training_mode=mode, compute_dtype=torch.bfloat16)
    short = estimate_memory(FAMILIES[family], setup)
    monkeypatch.setattr(fake_step, "NUM_RUN", 100)
    whole = estimate_memory(FAMILIES[family], setup)
    assert short.step == pytest.approx(whole.step, rel=0.005)
    assert short.copies == whole.copies
    assert short.activations == pytest.approx(whole.activations, rel=0.005)


def test_a_model_of_another_kind_gets_a_card_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    assert estimate_memory(config, SETUP).total > 0

    def fails(model: Any, shape: Any) -> Any:
        raise RuntimeError("needs the values of a tensor")

    monkeypatch.setattr(memory, "count_step", fails)
    # What was counted before is not counted again, and what fails here must not be kept.
    monkeypatch.setattr(memory, "_estimate_of", memory._estimate_of.__wrapped__)
    for family in FAMILIES:
        card = estimate_memory(FAMILIES[family], SETUP)
        assert not card.is_counted
        assert card.step > card.gradients
        assert "a rough formula" in str(card.lines())
    assert estimate_memory(config, SETUP).total > 0


def test_gradients_that_accumulate_and_ddps_buckets_are_there_all_the_time() -> None:
    one = estimate_memory(FAMILIES["llama"], SETUP)
    two = estimate_memory(FAMILIES["llama"], dataclasses.replace(SETUP, num_processes=2))
    assert two.total - one.total == one.gradients


# ---- weights and optimizer state, against the libraries that make them


def quantized_bytes(model: Any) -> int:
    """Of a bitsandbytes model's weights, with their quantization state."""

    def state_bytes(state: Any) -> int:
        values = vars(state).values()
        own = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
        return own + sum(state_bytes(v) for v in values if type(v) is type(state))

    total = sum(p.numel() * p.element_size() for p in model.parameters())
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    return total + sum(state_bytes(state) for state in states if state is not None)


def test_the_base_of_qlora_is_as_large_as_bitsandbytes_makes_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = Qwen3Config(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512}, head_dim=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
        )
    setup = dataclasses.replace(SETUP, training_mode="qlora", compute_dtype=torch.bfloat16)
    card = estimate_memory(config, setup)
    adapters = 4 * card.num_trainable
    assert card.weights - adapters == pytest.approx(quantized_bytes(model), rel=0.02)
    assert card.num_parameters - card.num_trainable == sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
    )


@pytest.mark.parametrize("kind", ["adamw", "bitsandbytes", "torchao 8 bit", "torchao"])
def test_optimizer_state_is_as_large_as_the_libraries_make_it(kind: str) -> None:
    config = FAMILIES["qwen3"]
    is_stochastic = kind.startswith("torchao")
    setup = dataclasses.replace(
        SETUP,
        masters="bf16_stochastic" if is_stochastic else "fp32",
        optimizer="adamw" if kind in ("adamw", "torchao") else "adamw_8bit",
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16 if is_stochastic else torch.float32
    )
    optimizer: Any
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters())
    elif kind == "bitsandbytes":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                bitsandbytes.optim.GlobalOptimManager.get_instance().register_module_override(
                    module, "weight", {"optim_bits": 32}
                )
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    else:
        pytest.importorskip("torchao.optim")
        hyper = Hyperparams(
            learning_rate=1e-3,
            fp_precision="bf16",
            masters="bf16_stochastic",
            optimizer="adamw" if kind == "torchao" else "adamw_8bit",
        )
        optimizer = build_optimizer(model, hyper)
        # What its step makes, without making one.
        states = [
            optimizer._new_buffer(p, signed) for p in model.parameters() for signed in (True, False)
        ]
        found = sum(map(state_bytes, states))
        assert estimate_memory(config, setup).optimizer == pytest.approx(found, rel=0.02)
        return
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    maps = ("qmap1", "qmap2", "step")  # shared by all parameters
    found = sum(
        state_bytes(value)
        for state in optimizer.state.values()
        for name, value in state.items()
        if name not in maps and isinstance(value, torch.Tensor)
    )
    assert estimate_memory(config, setup).optimizer == pytest.approx(found, rel=0.02)


def state_bytes(tensor: Any) -> int:
    """Of a plain tensor, or of one that torchao packs into codes and scales."""
    parts = [getattr(tensor, name, None) for name in ("codes", "scale")]
    tensors = [part for part in parts if part is not None] or [tensor]
    return sum(part.numel() * part.element_size() for part in tensors)


# ---- what a dry run proposes


CPU = torch.device("cpu")


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> list[MemorySetup]:
    """A card that is quick to make: 1,000 bytes a row, less by each option; all that were asked."""
    asked: list[MemorySetup] = []

    def card(config: Any, setup: MemorySetup) -> Any:
        asked.append(setup)
        total = 1000 * setup.batch_size * setup.length // 1024
        total -= 100 * setup.gradient_checkpointing + 100 * setup.optimizer.endswith("8bit")
        total -= {"full": 0, "lora": 300, "qlora": 500}[setup.training_mode]
        return dataclasses.replace(CARD, weights=total)

    monkeypatch.setattr(dry_run, "estimate_memory", card)
    return asked


CARD = memory.MemoryEstimate(*[0] * 11)
ROW = dataclasses.replace(SETUP, batch_size=4, gradient_accumulation=6, length=1024)


def fit_into(room: int, setup: MemorySetup = ROW) -> Any:
    return find_fit(None, setup, CPU, math.ceil(room / memory.USABLE))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_the_largest_batch_that_fits_keeps_the_effective_batch(
    size: int, needs: list[MemorySetup]
) -> None:
    found = fit_into(1000 * size + 1)
    assert (found.batch_size, found.gradient_accumulation) == (size, 24 // size)
    assert found.total == 1000 * size
    assert f"batch_size={size} gradient_accumulation={24 // size} fits" in found.words()
    assert {one.batch_size * one.gradient_accumulation for one in needs} == {24}
    assert len(needs) <= 4


@pytest.mark.parametrize(
    ("room", "wanted"),
    [
        (901, "gradient_checkpointing=true"),
        (801, "gradient_checkpointing=true hyperparams.optimizer=adamw_8bit"),
        (601, "training_mode=lora"),
        (401, "training_mode=qlora"),
    ],
)
def test_where_one_row_does_not_fit_the_mildest_change_that_is_enough_is_named(
    room: int, wanted: str, needs: list[MemorySetup]
) -> None:
    found = fit_into(room)
    assert found.batch_size is None
    [enough, *shorter] = [option for option in found.options if option.fits]
    assert all(word in str(enough) for word in wanted.split())
    assert [option.values["hyperparams.max_length"] for option in shorter] in ([512], [256], [])


def test_where_nothing_helps_that_is_said_with_all_that_was_tried(
    needs: list[MemorySetup],
) -> None:
    found = fit_into(-1000, dataclasses.replace(ROW, training_mode="lora"))
    assert [option.fits for option in found.options] == [False, False]
    assert found.options[-1].values["hyperparams.training_mode"] == "qlora"
    assert "a smaller model is needed" in found.words()


def test_every_mode_says_which_cards_are_enough() -> None:
    [need, *_] = mode_needs(FAMILIES["qwen3"], SETUP)
    assert (need.mode, need.cards) == ("full", {"24": True, "80": True})
    assert need.total == estimate_memory(FAMILIES["qwen3"], SETUP).total


@pytest.mark.parametrize(("size", "mode"), [("8B", "full"), ("0.6B", "qlora")])
def test_the_page_has_the_figures_of_this_version(size: str, mode: str) -> None:
    text = memory_card.PAGE.read_text(encoding="utf-8")
    assert memory_card.row(size, mode) in text, "python benchmarks/memory_card.py --write"


@pytest.mark.long
def test_the_whole_table_of_the_page_has_the_figures_of_this_version() -> None:
    assert memory_card.table() in memory_card.PAGE.read_text(encoding="utf-8")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "CGROUPS", tmp_path)
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    free = device_memory(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert device_memory(torch.device("cpu")) > free / 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert device_memory(torch.device("cpu")) == 4000


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4096))
    for sharers, room in ((1, 4096), (4, 1024)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharers))
        assert device_memory(torch.device("cpu")) == room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "moe"])
def test_shards_hold_their_part_and_what_is_gathered_for_a_layer(
    family: str, mode: str, dtype: torch.dtype
) -> None:
    config = FAMILIES[family]
    setup = dataclasses.replace(SETUP, training_mode=mode, compute_dtype=dtype)
    alone = estimate_memory(config, setup)
    few, many = (
        estimate_memory(config, dataclasses.replace(setup, is_sharded=True, num_processes=n))
        for n in (2, 1000)
    )
    assert few.is_counted
    assert (few.num_parameters, few.num_trainable) == (alone.num_parameters, alone.num_trainable)
    for name in ("weights", "gradients", "optimizer"):
        whole = getattr(alone, name)
        if name == "weights" and mode == "full":
            assert whole == 4 * alone.num_parameters
        assert getattr(few, name) == pytest.approx(whole / 2, abs=1)
    # The batch of a process is no smaller, whatever their number.
    assert few.activations == many.activations <= alone.activations
    assert many.total < few.total
    rest = many.step - many.copies
    assert many.activations < rest < 1.05 * max(alone.step, alone.activations + alone.loss)
    more = dataclasses.replace(setup, is_sharded=True, num_processes=2, gradient_accumulation=2)
    assert estimate_memory(config, more).step >= few.step + few.gradients


def test_gathered_are_the_ends_two_layers_and_the_gradients_of_the_largest_unit() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    ends = 2 * VOCABULARY * 64 + 64
    assert gathered_bytes(model, is_resharded=True) == 4 * (ends + 2 * layer) + 4 * max(ends, layer)
    assert gathered_bytes(model, is_resharded=False) == 4 * (ends + 5 * layer) + 4 * max(
        ends, layer
    )
    model.requires_grad_(False)
    assert gathered_bytes(model, is_resharded=True) == 4 * (ends + 2 * layer)


def test_a_dry_run_proposes_for_shards_what_shards_can_do() -> None:
    setup = dataclasses.replace(SETUP, is_sharded=True, num_processes=2)
    told = [set(values) for values in dry_run._changes(setup)]
    assert {"gradient_checkpointing"} in told
    assert not any({"optimizer", "masters"} & values for values in told)
    assert all(values.get("training_mode") != "qlora" for values in dry_run._changes(setup))


def test_a_gpu_keeps_room_for_its_context() -> None:
    gib = 2**30
    assert not fits(23 * gib, 24 * gib)
    assert fits(22 * gib, 24 * gib)
    assert fits(22 * gib, 24 * gib, device_type="cpu")
