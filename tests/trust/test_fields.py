"""N26: every config field has the effect it names, or is rejected."""

from __future__ import annotations

from typing import Any

import pytest

for part in ("training", "data", "distributed", "monitoring"):
    pytest.register_assert_rewrite(f"tests.trust.effects_{part}")

from tests.trust import (  # noqa: E402
    effects_data,  # noqa: F401
    effects_distributed,  # noqa: F401
    effects_monitoring,  # noqa: F401
    effects_training,  # noqa: F401
)
from tests.trust.effects import EFFECTS  # noqa: E402
from tests.trust.lab import Lab  # noqa: E402
from trainer.config.flags import config_fields  # noqa: E402
from trainer.errors import TrainerError  # noqa: E402

CHECKS = list(dict.fromkeys(EFFECTS.values()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), tokenizer)


def test_n26_every_field_of_the_schema_is_in_the_table() -> None:
    missing = sorted(set(config_fields()) - set(EFFECTS))
    assert not missing, f"enter a check that sees the effect of {missing} (tests/trust/effects*.py)"
    assert not set(EFFECTS) - set(config_fields())


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_n26_the_field_has_the_effect_it_names(check: Any, lab: Lab) -> None:
    check(lab)


FIELDS = (
    *("hyperparams.weight_decay", "hyperparams.max_length", "hyperparams.warmup_steps"),
    *("model.chat_template", "model.add_tokens", "model.attn_implementation"),
    *("data.format", "data.columns", "data.weights", "data.validation_split", "data.max_rows"),
    *("data.truncation", "data.max_bad_rows", "data.cache_dir", "data.group_by_length"),
    *("profile.options", "profile.system_prompt", "monitoring.num_eval_samples"),
    *("monitoring.report_to", "locked.vocab_size", "lora.r", "lora.alpha", "output.resume"),
)


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
def test_mutant_n26_field_ignored_is_killed(
    field: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is thrown away before the engine sees it; its check must notice."""
    section, name = field.split(".")
    make = Lab.config

    def forgetful(self: Lab, **sections: Any) -> Any:
        kept = {k: v for k, v in sections.get(section, {}).items() if k != name}
        return make(self, **{**sections, section: kept})

    monkeypatch.setattr(Lab, "config", forgetful)
    with pytest.raises((AssertionError, TrainerError)):
        EFFECTS[field](lab)
