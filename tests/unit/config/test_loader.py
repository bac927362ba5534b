"""defaults < file < environment < flags, the origin of each value, and mistakes that are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import trainer.config
from trainer.config import ConfigLoader, TrainerConfig, resolve
from trainer.config.flags import config_fields, parse_flags
from trainer.errors import ConfigError
from trainer.net import CUT

FILES = {
    "run.json": '{"hyperparams": {"batch_size": 2, "learning_rate": 1e-5}} // comment',
    "run.yaml": "hyperparams:\n  batch_size: 2\n  learning_rate: 1e-5\n",
    "run.toml": "[hyperparams]\nbatch_size = 2\nlearning_rate = 1e-5\n",
}


def load(file: Path | None = None, env: dict[str, str] | None = None, *words: str) -> Any:
    return ConfigLoader.load(file, env or {}, parse_flags(list(words)))


@pytest.mark.parametrize("name", FILES)
def test_every_file_type_gives_the_same_values(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    hyper = load(path).config.hyperparams
    assert (hyper.batch_size, hyper.learning_rate) == (2, 1e-5)


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"hyperparams": {"batch_size": 2, "max_steps": 7, "num_epochs": 5}}')
    env = {"TRAINER_HYPERPARAMS__BATCH_SIZE": "3", "TRAINER_HYPERPARAMS__MAX_STEPS": "8"}
    loaded = load(path, env, "--batch-size", "4")
    hyper = loaded.config.hyperparams
    assert (hyper.batch_size, hyper.max_steps, hyper.num_epochs) == (4, 8, 5)
    assert hyper.gradient_accumulation == TrainerConfig().hyperparams.gradient_accumulation
    origins = {key: loaded.origins[f"hyperparams.{key}"] for key in ("batch_size", "max_steps")}
    assert "--batch-size" in origins["batch_size"]
    assert "TRAINER_HYPERPARAMS__MAX_STEPS" in origins["max_steps"]
    assert "run.json" in loaded.origins["hyperparams.num_epochs"]
    assert loaded.origins["hyperparams.gradient_accumulation"] == "default"


@pytest.mark.parametrize(
    ("snippet", "key", "value"),
    [
        (
            '{"monitoring": {"preview_backend": "remote_3090", '
            '"remote_3090_host": "192.168.1.20", "remote_3090_port": 8765}}',
            "monitoring.remote_3090_host",
            "192.168.1.20",
        ),
        (
            '{"monitoring": {"preview_max_tokens": 512, "preview_temperature": 0.8, '
            '"max_eval_tokens": 4096}}',
            "monitoring.max_eval_tokens",
            4096,
        ),
        ('{"profile": {"name": "regime3"}}  // or "emoji_think"', "profile.name", "regime3"),
    ],
)
def test_the_three_classic_snippets_load_as_they_stand(
    snippet: str, key: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(snippet)
    section, name = key.split(".")
    assert getattr(getattr(load(path).config, section), name) == value


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1E-05"])
def test_a_small_number_is_a_number_however_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"hyperparams: {{learning_rate: {text}}}\n")
    assert load(path).config.hyperparams.learning_rate == 1e-5
    assert load(None, {}, "--learning-rate", text).config.hyperparams.learning_rate == 1e-5
    env = {"TRAINER_HYPERPARAMS__LEARNING_RATE": text}
    assert load(None, env).config.hyperparams.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"hyperparms": {}}', "hyperparams"),
        ('{"hyperparams": {"batchsize": 1}}', "batch_size"),
        ('{"hyperparams": {"batch_size": "many"}}', "batch_size"),
        ('{"hyperparams": {"batch_size": 1, "batch_size": 2}}', "not valid JSON"),
        ('{"hyperparams": 3}', "mapping of fields"),
        ("[1]", "mapping of sections"),
        ("{", "not valid JSON"),
        ('{"monitoring": {"preview_backend": "remote_3090"}}', "remote_3090_host"),
        ('{"hyperparams": {"warmup_steps": 50, "max_steps": 10}}', "max_steps"),
        ('{"data": {"shuffle": false, "group_by_length": true}}', "group_by_length"),
    ],
)
def test_a_mistake_in_a_file_is_named(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json") as caught:
        load(path)
    assert expected in str(caught.value)


CROSS_FIELD_MISTAKES: list[tuple[dict[str, Any], set[str]]] = [
    ({"hyperparams.warmup_steps": 1.5}, {"hyperparams.warmup_steps"}),
    (
        {"hyperparams.warmup_steps": 50, "hyperparams.max_steps": 10},
        {"hyperparams.warmup_steps", "hyperparams.max_steps"},
    ),
    (
        {"data.shuffle": False, "data.group_by_length": True},
        {"data.shuffle", "data.group_by_length"},
    ),
    (
        {"data.mix_probabilities": (0.5, 0.5), "data.weights": (1.0, 2.0)},
        {"data.mix_probabilities", "data.weights"},
    ),
    ({"data.mix_probabilities": (0.5, 0.4)}, {"data.mix_probabilities"}),
    ({"data.mix_epoch": "longest"}, {"data.mix_epoch", "data.mix_probabilities"}),
    ({"output.allow_changes": True}, {"output.allow_changes", "output.resume"}),
    ({"data.max_bad_rows": 3}, {"data.max_bad_rows", "data.on_bad_row"}),
    (
        {"data.enable_packing": True, "data.shuffle": False, "data.group_by_length": False},
        {"data.enable_packing", "data.shuffle"},
    ),
    ({"data.shuffle_buffer": 9}, {"data.shuffle_buffer", "data.streaming"}),
    (
        {"data.streaming": True, "data.enable_packing": True, "hyperparams.max_steps": 9},
        {"data.streaming", "data.enable_packing"},
    ),
    (
        {"data.streaming": True, "data.weights": [1.0], "hyperparams.max_steps": 9},
        {"data.streaming", "data.weights"},
    ),
    ({"data.streaming": True}, {"data.streaming", "hyperparams.max_steps"}),
    (
        {
            "data.streaming": True,
            "environment.num_workers": 2,
            "hyperparams.max_steps": 9,
            "hyperparams.warmup_steps": 0,
        },
        {"data.streaming", "environment.num_workers"},
    ),
    (
        {"monitoring.preview_backend": "remote_3090"},
        {"monitoring.preview_backend", "monitoring.remote_3090_host"},
    ),
    (
        {"monitoring.preview_backend": "openai"},
        {"monitoring.preview_backend", "monitoring.openai_base_url"},
    ),
    (
        {
            "monitoring.preview_backend": "openai",
            "monitoring.openai_base_url": f"http://{CUT}@127.0.0.1/v1",
        },
        {"monitoring.openai_base_url"},
    ),
    (
        {
            "monitoring.preview_backend": "openai",
            "monitoring.openai_base_url": "http://127.0.0.1/v1",
            "monitoring.preview_golden_logprobs": True,
        },
        {"monitoring.preview_backend", "monitoring.preview_golden_logprobs"},
    ),
    (
        {"monitoring.notify": [f"https://hooks.example.com/{CUT}"]},
        {"monitoring.notify"},
    ),
    (
        {"monitoring.notify_silence": 60},
        {"monitoring.notify", "monitoring.notify_silence"},
    ),
    (
        {"monitoring.num_preview_samples": 4, "monitoring.preview_temperature": 0},
        {"monitoring.num_preview_samples", "monitoring.preview_temperature"},
    ),
    (
        {"monitoring.num_preview_samples": 4, "monitoring.inference_interval": 0},
        {
            "monitoring.num_preview_samples",
            "monitoring.inference_interval",
            "monitoring.num_eval_samples",
        },
    ),
    (
        {"distributed.strategy": "fsdp2", "hyperparams.optimizer": "muon"},
        {"distributed.strategy", "hyperparams.optimizer"},
    ),
    (
        {"distributed.strategy": "ddp", "distributed.cpu_offload": True},
        {"distributed.strategy", "distributed.cpu_offload"},
    ),
    (
        {"monitoring.canary_set": "general", "monitoring.inference_interval": 0},
        {
            "monitoring.canary_set",
            "monitoring.inference_interval",
            "monitoring.num_eval_samples",
        },
    ),
    (
        {
            "monitoring.canary_set": "general",
            "monitoring.preview_backend": "openai",
            "monitoring.openai_base_url": "http://127.0.0.1/v1",
        },
        {"monitoring.canary_set", "monitoring.preview_backend"},
    ),
    (
        {"monitoring.tracker_texts": True, "monitoring.report_to": ["none"]},
        {"monitoring.tracker_texts", "monitoring.report_to"},
    ),
    (
        {"monitoring.tracker_texts": True, "monitoring.inference_interval": 0},
        {"monitoring.tracker_texts", "monitoring.inference_interval"},
    ),
    (
        {"monitoring.score_columns": {"solution": "answer"}, "monitoring.scores": ["exact"]},
        {"monitoring.score_columns", "monitoring.scores"},
    ),
    (
        {"monitoring.scores": ["exact"], "monitoring.inference_interval": 0},
        {"monitoring.scores", "monitoring.inference_interval"},
    ),
    (
        {"monitoring.num_score_prompts": 10},
        {"monitoring.num_score_prompts", "monitoring.scores"},
    ),
    (
        {
            "monitoring.num_score_prompts": 10,
            "monitoring.scores": ["exact"],
            "monitoring.preview_backend": "openai",
            "monitoring.openai_base_url": "http://127.0.0.1/v1",
        },
        {"monitoring.num_score_prompts", "monitoring.preview_backend"},
    ),
    (
        {"lora.neftune_alpha": 5.0},
        {"lora.neftune_alpha", "hyperparams.training_mode"},
    ),
    (
        {"hyperparams.masters": "bf16_stochastic", "hyperparams.training_mode": "lora"},
        {"hyperparams.masters", "hyperparams.training_mode"},
    ),
    (
        {"hyperparams.masters": "bf16_stochastic", "hyperparams.fp_precision": "fp32"},
        {"hyperparams.masters", "hyperparams.fp_precision"},
    ),
    (
        {"hyperparams.masters": "bf16_stochastic", "hyperparams.optimizer": "muon"},
        {"hyperparams.masters", "hyperparams.optimizer"},
    ),
    (
        {"hyperparams.compile": "blocks", "hyperparams.training_mode": "qlora"},
        {"hyperparams.compile", "hyperparams.training_mode"},
    ),
    (
        {"hyperparams.compile": "blocks", "model.attn_implementation": "flash_attention_2"},
        {"hyperparams.compile", "model.attn_implementation"},
    ),
    (
        {"hyperparams.early_stopping_patience": 2, "monitoring.micro_eval_interval": 0},
        {"hyperparams.early_stopping_patience", "monitoring.micro_eval_interval"},
    ),
    (
        {
            "hyperparams.early_stopping_min_delta": 0.1,
            "hyperparams.early_stopping_metric": "score.exact",
        },
        {"hyperparams.early_stopping_min_delta", "hyperparams.early_stopping_metric"},
    ),
    (
        {"hyperparams.early_stopping_metric": "score.exact", "output.best_by": "val_loss"},
        {
            "hyperparams.early_stopping_metric",
            "hyperparams.early_stopping_patience",
            "output.best_by",
        },
    ),
    (
        {"output.best_by": "score.exact", "monitoring.scores": ["exact"]},
        {"output.best_by", "monitoring.num_score_prompts"},
    ),
    (
        {"monitoring.score_lag": 2},
        {"monitoring.score_lag", "hyperparams.early_stopping_metric"},
    ),
    (
        {"output.final_model": "best", "monitoring.micro_eval_interval": 0},
        {"output.final_model", "monitoring.micro_eval_interval"},
    ),
]


@pytest.mark.parametrize(
    ("values", "taking_part"),
    CROSS_FIELD_MISTAKES,
    ids=[" ".join(values) for values, _ in CROSS_FIELD_MISTAKES],
)
def test_a_rule_over_several_options_names_where_those_were_set_and_no_others(
    values: dict[str, Any], taking_part: set[str], tmp_path: Path
) -> None:
    """Every option is set somewhere, so that each could be blamed: `lora.r` for any r in a text."""
    nested: dict[str, dict[str, Any]] = {}
    for key, field in config_fields().items():
        nested.setdefault(field.section, {})[field.name] = values.get(key, field.default)
    path = tmp_path / "all.json"
    path.write_text(json.dumps(nested))
    with pytest.raises(ConfigError) as caught:
        load(path)
    [told] = str(caught.value).splitlines()
    rule, _, where = told.partition(" Set here: ")
    assert set(re.findall(r"(\S+) from file", where)) == taking_part
    assert all(key.split(".")[1] in rule for key in taking_part)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hyperparams": {"optimizer": "muon"}}, "works on whole matrices"),
        ({"hyperparams": {"optimizer": "adamw_8bit"}}, "works on whole matrices"),
        ({"hyperparams": {"optimizer": "paged_adamw_8bit"}}, "works on whole matrices"),
        ({"hyperparams": {"masters": "bf16_stochastic"}}, "is for whole weights"),
        ({"hyperparams": {"compile": "blocks"}}, "not proved on shards"),
        ({"hyperparams": {"training_mode": "qlora"}}, "4-bit weights cannot be shared out"),
        ({"hyperparams": {"auto_batch_size": True}}, "tries batches on a whole model"),
        (
            {"model": {"add_tokens": ["<a>"]}, "hyperparams": {"training_mode": "lora"}},
            "trains single rows of the embedding in training_mode=lora",
        ),
    ],
    ids=lambda value: (
        "-".join(map(str, next(iter(value.values())).values())) if isinstance(value, dict) else ""
    ),
)
def test_what_is_not_proved_on_shards_is_refused_with_the_option(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**values, "distributed": {"strategy": "fsdp2"}}))
    with pytest.raises(ConfigError, match=words) as caught:
        load(path)
    section, options = next(iter(values.items()))
    assert all(f"{section}.{name} from file" in str(caught.value) for name in options)


def test_added_tokens_of_full_training_are_shared_out(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"model": {"add_tokens": ["<a>"]}, "distributed": {"strategy": "fsdp2"}})
    )
    assert load(path).config.sharding_problem is None


def test_options_that_are_defaults_are_not_said_to_be_set() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {}, "--data.max_bad_rows", "3", "--lora.r", "4")
    assert str(caught.value).endswith("Set here: data.max_bad_rows from flag --data.max_bad_rows.")


def test_every_rule_over_several_options_is_tested() -> None:
    files = Path(trainer.config.__file__).parent.glob("*.py")
    source = "".join(path.read_text() for path in files)
    assert source.count("raise CombinationError(") == len(CROSS_FIELD_MISTAKES)
    assert "raise ValueError" not in source


@pytest.mark.parametrize("name", ["TRAINER_NOPE", "TRAINER_HYPERPARAMS__BATCHSIZE"])
def test_an_unknown_variable_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(None, {name: "1"})


def test_an_unknown_flag_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean --hyperparams\.batch_size"):
        load(None, {}, "--hyperparams.batch_sise", "3")


def test_two_flags_for_one_field_must_agree() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        load(None, {}, "--bf16", "--fp32")


def test_lists_and_mappings_come_from_flags_and_variables() -> None:
    words = ("--monitoring.preview_prompts", "Hi", "--monitoring.preview_prompts", "Who?")
    assert load(None, {}, *words).config.monitoring.preview_prompts == ("Hi", "Who?")
    env = {"TRAINER_MONITORING__PREVIEW_PROMPTS": '["a", "b"]'}
    assert load(None, env).config.monitoring.preview_prompts == ("a", "b")
    loaded = load(None, {}, "--profile.options", "share=0.5", "--profile.options", "word=x")
    assert loaded.config.profile.options == {"share": 0.5, "word": "x"}


@pytest.mark.parametrize(
    "text", ['{"hyperparams": {"batch_size": true}}', "hyperparams:\n  learning_rate: yes\n"]
)
def test_true_is_no_number(text: str, tmp_path: Path) -> None:
    path = tmp_path / ("c.json" if text.startswith("{") else "c.yaml")
    path.write_text(text)
    with pytest.raises(ConfigError, match="a number is needed, not true or false"):
        load(path)


@pytest.mark.parametrize("word", ["inf", "nan", "1e999"])
@pytest.mark.parametrize(
    "flag", ["--learning-rate", "--epochs", "--monitoring.preview_temperature"]
)
def test_a_number_that_is_not_finite_is_refused(flag: str, word: str) -> None:
    with pytest.raises(ConfigError, match=r"finite number|greater than"):
        load(None, None, flag, word)


def test_a_resolved_config_of_rows_in_order_loads_again() -> None:
    config = resolve(load(None, None, "--data.shuffle", "false").config)
    assert not config.data.group_by_length
    assert TrainerConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_home_folder_in_a_config_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = resolve(load(None, None, "--output=~/runs").config)
    assert config.output.output_dir == "/home/me/runs"
