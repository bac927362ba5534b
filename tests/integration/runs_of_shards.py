"""Runs of one and of several processes on the same rows, forked from one that has imported all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.integration.forked_runs import ROOT, other_paths

ROWS_OF_STEP, STEPS, SAVED = 8, 10, 5
STRATEGY = {1: "auto", 2: "fsdp2", 4: "fsdp2"}


class Runs:
    """Runs in forked processes; a straight one of each kind is made once."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self._tokenizer = root, tokenizer
        self._straight: dict[str, Path] = {}
        self._count = 0
        script = Path(__file__).with_name("forked_ranks.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *other_paths()])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(root / "launcher.txt").open("w"),
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        for name, asked in (("rows", "what is {n} plus {n}?"), ("more", "double {n}")):
            rows = [
                {"question": asked.format(n=n), "answer": f"{2 * n}. " * (n % 4)}
                for n in range(1, 73)
                if n % 4
            ]
            path = root / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def model(self, kind: str) -> Path:
        """A tiny Qwen3 with a tied head; `full untied`, or `full moe` of a Mixtral."""
        from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

        name = kind.partition(" ")[2] or "tied"
        folder = self.root / f"model-{name}"
        if not folder.exists():
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
            ids = {"vocab_size": len(self._tokenizer), "eos_token_id": 2, "pad_token_id": 0}
            if name == "moe":
                config = MixtralConfig(**sizes, **heads, **ids, num_local_experts=4)
                MixtralForCausalLM(config).save_pretrained(folder)
            else:
                config = Qwen3Config(**sizes, **heads, **ids, tie_word_embeddings=name == "tied")
                Qwen3ForCausalLM(config).save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
        return folder

    def config(self, out: Path | str, world: int, strategy: str, kind: str) -> dict[str, Any]:
        return {
            "top": {
                "model_path": str(self.model(kind)),
                "dataset_path": str(self.root / "rows.jsonl"),
                "output_dir": str(out),
            },
            "hyperparams": {
                "batch_size": ROWS_OF_STEP // world,
                "learning_rate": 1e-2,
                "max_steps": STEPS,
                "fp_precision": "fp32",
                "training_mode": kind.partition(" ")[0],
            },
            "monitoring": {"inference_interval": 0, "micro_eval_interval": 5, "report_to": []},
            "data": {"validation_split": 0.2},
            "environment": {"num_threads": 1, "device": "cpu"},
            # A head that is tied, and trained in full beside the adapters, is the hardest of them.
            "lora": {"modules_to_save": ["lm_head"]} if kind.startswith("lora") else {},
            "output": {"checkpoint_interval": SAVED, "keep_checkpoints": 9},
            "distributed": {"strategy": strategy},
        }

    def launch(self, config: dict[str, Any], world: int, **more: Any) -> tuple[list[int], Path]:
        """Exit codes, and the folder with what the ranks say."""
        self._count += 1
        said = self.root / f"said-{self._count}"
        words = {"config": config, "folder": str(said), "world": world, **more}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline()), said

    def ended(self, config: dict[str, Any], world: int, **more: Any) -> Path:
        """The folder with what the ranks of a run say, which came to its end."""
        codes, said = self.launch(config, world, **more)
        text = "".join(path.read_text()[-2000:] for path in sorted(said.glob("*.txt")))
        assert codes == [0] * world, text
        found = json.loads((said / "rank-0.json").read_text())
        assert found["is_fsdp2"] == (config["distributed"]["strategy"] == "fsdp2")
        assert found["processes"] == world
        return said

    def straight(self, world: int, strategy: str, kind: str) -> Path:
        """The folder of what the ranks said; the run's own is beside it."""
        name = f"{kind.replace(' ', '-')}-{world}-{strategy}"
        if name not in self._straight:
            config = self.config(self.root / name, world, strategy, kind)
            self._straight[name] = self.ended(config, world)
            (self._straight[name] / "run").symlink_to(self.root / name)
        return self._straight[name]

    def half(self, said: Path, *, damaged: bool = False) -> Path:
        """A copy of a run as it was at its first checkpoint, or with a second that is damaged."""
        self._count += 1
        out = self.root / f"again-{self._count}"
        last = f"step-{STEPS:08d}"
        leave_out = ["final_model", ".lock", *([] if damaged else [last])]
        shutil.copytree(said / "run", out, ignore=shutil.ignore_patterns(*leave_out))
        if damaged:
            path = sorted((out / "checkpoints" / last / "weights").iterdir())[-1]
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return out

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def figures(run: Path) -> dict[str, float]:
    """Losses of a run's steps and evaluations, and of the sources of its rows."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values["type"] == "StepDone":
            found[f"step {values['step']}"] = values["train_loss"]
        elif values["type"] == "EvaluationDone":
            found[f"validation {values['step']}"] = values["val_loss"]
        losses = {key: loss for key, loss in values.items() if "loss/" in key}
        found |= {f"{key} {values['step']}": loss for key, loss in losses.items()}
    return found


# ---- runs with options of their own

Case = tuple[str, dict[str, Any]]
"""Which model, and sections of options."""


def config_of(runs: Runs, out: Path, world: int, *case: Any) -> dict[str, Any]:
    """Of a run of shards, or of one process."""
    model, sections = case
    config = runs.config(out, world, STRATEGY[world], f"full {model}")
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    if "mix_probabilities" in config["data"]:
        config["top"]["dataset_path"] += f",{runs.root / 'more.jsonl'}"
    return config


def trained(runs: Runs, name: str, world: int, case: Case) -> Path:
    """The folder of a run; it is made once."""
    out = runs.root / f"{name.replace(' ', '-').replace(',', '')}-{world}"
    if not out.exists():
        runs.ended(config_of(runs, out, world, *case), world)
    return out


def check_close(one: Path, other: Path, limit: float) -> None:
    """Final models, or adapters, of two runs."""
    files = [sorted((run / "final_model").glob("*.safetensors")) for run in (one, other)]
    a, b = (load_file(path) for [path] in files)
    assert a.keys() == b.keys()
    far = {name: float((a[name].float() - b[name].float()).abs().max()) for name in a}
    assert {name: one for name, one in far.items() if one > limit} == {}
