"""run.json and config.resolved.json: what a run is made of, and how it ended."""

from __future__ import annotations

import logging
from typing import Any

from trainer.config.schema import TrainerConfig
from trainer.core.resume import SEMANTICS, environment_manifest
from trainer.core.run import RunContext, TrainingResult
from trainer.core.run_folder import RunFolder
from trainer.data.card import card_lines
from trainer.errors import EXIT_USER_INPUT, OutputError

logger = logging.getLogger(__name__)


def resolved_config(config: TrainerConfig) -> dict[str, Any]:
    """The config as JSON values that start the same run anew: where it was resumed is no part."""
    values: dict[str, Any] = config.model_dump(mode="json")
    values["output"]["resume"] = None
    return values


def write_manifest(run: RunContext, folder: RunFolder, config: TrainerConfig) -> None:
    """Write both files: from here on the run is on disk.

    Raises:
        OutputError: the disk is full.
    """
    resolved = resolved_config(config)
    run.is_recorded = True
    folder.write_json(folder.config_resolved, resolved)
    folder.write_json(
        folder.run_json,
        {
            "state": "training",
            "semantics": SEMANTICS,
            "config": resolved,
            "date": run.date.isoformat(),
            "system_prompt": run.data.system_prompt,
            "precision": run.precision.reason,
            "device": str(run.device),
            "data_card": run.data.card.as_json(),
            "data_card_lines": card_lines(run.data.card),
            "data_files_sha256": run.data.file_hashes,
            "data_fingerprint": run.data.train.fingerprint(),
            "resumed_from_step": run.resume.step if run.resume else None,
            "changed_since_checkpoint": list(run.changes),
            "environment": environment_manifest(),
        },
    )


def leave_folder(run: RunContext, folder: RunFolder, result: TrainingResult) -> None:
    """run.json says how it ended; a refused run leaves a folder as it was."""
    is_refused = result.exit_code == EXIT_USER_INPUT and not run.step
    try:
        if not run.is_recorded:  # what is there, if anything, is an earlier run's
            folder.discard_if_empty()
        elif is_refused and run.resume is None:
            folder.discard_unstarted_run()
        else:
            ending = {"exit_code": result.exit_code, "summary": result.summary}
            folder.update_json(folder.run_json, {"state": result.state, **ending})
    except (OSError, OutputError) as error:
        logger.error("%s: cannot be written at the end (%s)", folder.path, error)
    folder.close()
