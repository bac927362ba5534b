"""`trainer demo`: the whole job in about a minute on a CPU, with nothing downloaded."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainer.commands.arguments import MAX_SEED, parse, whole_number, words_while_loading
from trainer.config import TrainerConfig, create_default_config
from trainer.counts import counted
from trainer.errors import OutputError
from trainer.views.report import RunRecords
from trainer.views.terminal import create_display
from trainer.views.words import preview_failure_words

if TYPE_CHECKING:
    from trainer.core import TrainingResult
    from trainer.models.tiny import DemoData

STEPS = 260

BATCH_SIZE = 64

NUM_FINAL = 200

NUM_PREVIEWED = 5

PREVIEW_EVERY_STEPS = 20

NUM_SCORE_PROMPTS = 200

PATIENCE = 3


def run(argv: list[str]) -> int:
    """Write the data, train, and judge 200 held-out answers."""
    words = parse(_parser(), argv)
    console = Console()
    folder = _make_folder(Path(words.output))
    console.print(
        f"A model of 0.8M parameters learns {counted(words.steps, 'step')} of symbolic tasks "
        "such as 'max of 42 and 17?'.\nGolden is the right answer; beside it stands what the "
        "current "
        f"weights say. Folder: {folder}\nLive page: trainer monitor {shlex.quote(str(folder))}\n",
        highlight=False,
    )
    # torch takes seconds to load; mistakes on the command line are told before.
    with words_while_loading(words.display):
        import trainer.core.engine
        from trainer.models.tiny import write_demo_data

    data = write_demo_data(
        folder / "data",
        num_train_rows=words.steps * BATCH_SIZE,
        num_validation_rows=NUM_PREVIEWED
        + NUM_FINAL
        + (NUM_SCORE_PROMPTS if words.early_stopping else 0),
        seed=words.seed,
    )
    records = RunRecords({}, is_report=True)
    engine = trainer.core.engine.TrainerEngine(observers=[create_display(words.display), records])
    config = demo_config(
        folder,
        data,
        steps=words.steps,
        seed=words.seed,
        backend=words.preview_backend,
        patience=words.early_stopping,
    )
    result = engine.run_job(config)
    records.finish(folder)
    if result.error_message:
        word = "stopped" if result.state == "stopped" else "error"
        print(f"{word}: {result.error_message}", file=sys.stderr)
    if not result.success:
        return result.exit_code
    _report(console, folder, data, result)
    return result.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer demo", description=__doc__)
    parser.add_argument("--output", default="demo_run", help="folder of the run [demo_run]")
    parser.add_argument(
        "--steps", type=whole_number(1), default=STEPS, help=f"optimizer steps [{STEPS}]"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=0, help="seed of data and weights [0]"
    )
    parser.add_argument(
        "--preview-backend",
        choices=("local", "sidecar"),
        default="local",
        help="where previews are generated: in this process or in a second one [local]",
    )
    parser.add_argument(
        "--early-stopping",
        type=whole_number(1),
        nargs="?",
        const=PATIENCE,
        default=0,
        metavar="PATIENCE",
        help=f"stop after so many evaluations of {NUM_SCORE_PROMPTS} held-out prompts at which "
        f"score.exact has not clearly risen [{PATIENCE}], and keep the best step",
    )
    parser.add_argument(
        "--display",
        choices=("auto", "rich", "plain", "json", "quiet"),
        default="auto",
        help="the terminal view [auto]",
    )
    return parser


def demo_config(
    folder: Path,
    data: DemoData,
    *,
    steps: int,
    seed: int,
    backend: str = "local",
    patience: int = 0,
) -> TrainerConfig:
    """The recipe: Muon for the matrices learns these tasks in 100 steps, AdamW needs far more.

    Args:
        patience: evaluations without a clear rise of score.exact after which it stops; 0: none.
    """
    stopping: dict[str, Any] = {}
    scoring: dict[str, Any] = {"micro_eval_interval": 50}
    if patience:
        stopping = {"early_stopping_patience": patience, "early_stopping_metric": "score.exact"}
        scoring = {
            "scores": ["exact"],
            "num_score_prompts": NUM_SCORE_PROMPTS,
            "micro_eval_interval": PREVIEW_EVERY_STEPS,
        }
    return create_default_config(
        model_path="tiny",
        dataset_path=str(data.train_path),
        output_dir=str(folder),
        hyperparams={
            "optimizer": "muon",
            "learning_rate": 5e-3,
            "weight_decay": 0.01,
            "batch_size": BATCH_SIZE,
            "max_steps": steps,
            "warmup_steps": min(20, steps - 1),
            "max_length": 128,
            "fp_precision": "fp32",
            **stopping,
        },
        data={"validation_path": str(data.validation_path)},
        profile={"name": "regime3", "system_prompt": "Answer in canonical form."},
        monitoring={
            "preview_backend": backend,
            "inference_interval": PREVIEW_EVERY_STEPS,
            "num_eval_samples": NUM_PREVIEWED,
            "preview_max_tokens": 32,
            "preview_temperature": 0.0,
            **scoring,
            "final_eval_prompts": NUM_FINAL,
            "max_eval_tokens": 32,
        },
        environment={"seed": seed, "offline": True},
    )


def _make_folder(wanted: Path) -> Path:
    """Make `wanted`, or `wanted-2` and so on where a run is there already: a demo is run again."""
    if wanted.name in ("", ".."):  # such as "."
        wanted = wanted.resolve()
    for number in range(1, 1000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be created ({error.strerror}); choose another --output."
            ) from error
    raise OutputError(f"{wanted}: there are a thousand demo runs already; remove some.")


def _report(console: Console, folder: Path, data: DemoData, result: TrainingResult) -> None:
    """Scores by operation, where things are, what to try next; the score is the last line."""
    from trainer.models.tiny import operation_of

    found = result.summary["final_evaluation"]
    answers = [json.loads(line) for line in Path(found["answers"]).read_text().splitlines()]
    asked = Counter(operation_of(row["prompt"]) for row in answers)
    right = Counter(operation_of(row["prompt"]) for row in answers if row["matches"])
    by_operation = ", ".join(
        f"{name} {100 * right[name] / asked[name]:.0f} %" for name in sorted(asked)
    )
    lines = [
        "",
        f"model:     {result.model_path}",
        f"answers:   {found['answers']}",
        f"report:    {folder / 'report.html'}",
        f"talk to it:         trainer chat {folder}",
        f"look at it:         trainer monitor {folder}",
        "train on your rows: trainer train --dataset data.jsonl --model qwen3 --output outputs",
        "",
        f"by operation: {by_operation}",
        f"always answering the commonest answer: {100 * data.commonest_answer_share:.1f} %; "
        f"copying the question and the commonest result: {100 * data.commonest_result_share:.1f} %",
        exact_match_line(found),
    ]
    failure = preview_failure_words(result.summary)
    if failure is not None:
        lines.append(f"warning: {failure}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def exact_match_line(found: dict[str, Any]) -> str:
    """The demo's last line."""
    share = 100 * found["exact_match"]
    return f"exact match: {share:.1f} % ({found['matched']}/{found['num_prompts']})"
