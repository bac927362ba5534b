"""The command line: argv -> command -> exit code. No training logic.

Each command lives in `trainer/commands/` and is imported only when it is asked for, so that
`trainer --help` and `trainer config explain` load no torch.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import select
import sys
import warnings

from trainer import __version__
from trainer.child import end_quickly, is_told_by_first, quiet_libraries
from trainer.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_SIGINT,
    EXIT_USER_INPUT,
    ConfigError,
    StoppedError,
    TrainerError,
)

COMMANDS = {
    "demo": "train a tiny model in about a minute; nothing is downloaded",
    "train": "fine-tune a model: --dataset data.jsonl --model qwen3 --output outputs",
    "monitor": "serve the live page of a run or of a folder of runs: trainer monitor outputs",
    "watch": "show a run of another process in this terminal: trainer watch outputs",
    "report": "write a run as one offline HTML file: trainer report outputs",
    "chat": "talk to the model of a finished run: trainer chat outputs",
    "serve": "answer prompts over HTTP: trainer serve --model qwen3 --port 8765",
    "export": "write a model folder from a run: trainer export outputs --merge",
    "data": "inspect rows and their trained tokens; show or clear the cache",
    "models": "list the short names of models",
    "config": "show, explain, validate or init a config file",
    "doctor": "print the hardware, versions and optional packages of this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after the program's name; None: those of the process.
    Returns:
        0 completed, 1 a failed run, 2 the user's input, 129, 130 and 143 signals.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the locale cannot show
            stream.reconfigure(errors="replace")
    if not sys.warnoptions:  # of libraries, about each other
        warnings.filterwarnings("ignore", category=FutureWarning)
    rank = f"[rank {os.environ['RANK']}] " if "LOCAL_RANK" in os.environ else ""
    logging.basicConfig(format=f"{rank}%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    quiet_libraries()
    end_quickly()
    try:
        code = _run_told(words)
        sys.stdout.flush()  # at exit, a reader that went away would be a traceback
    except BrokenPipeError:
        if not _let_go_of_closed_streams():
            raise  # some other pipe: that is a fault
        return EXIT_COMPLETED  # `trainer ... | head`: nothing is left to say
    return code


def _run_told(words: list[str]) -> int:
    """Run a command; what went wrong is one message, and its exit code."""
    try:
        return _run(words)
    except SystemExit as end:  # argparse after --help, a signal handler
        if isinstance(end.__context__, BrokenPipeError):  # rich, which has let go of its stream
            return EXIT_COMPLETED
        return end.code if isinstance(end.code, int) else EXIT_FAILED
    except TrainerError as error:
        return _mistake(str(error), error.exit_code)
    except StoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_SIGINT
    except OSError as error:
        if error.filename is None:  # no file or folder that the user could mend
            raise
        return _mistake(f"{error.filename}: {error.strerror}.", EXIT_USER_INPUT)


def _mistake(words: str, exit_code: int) -> int:
    """Say what was wrong; of the processes of one machine that torchrun started, one says it."""
    if not is_told_by_first():
        print(f"error: {words}", file=sys.stderr)
    return exit_code


def _let_go_of_closed_streams() -> bool:
    """Whether nobody reads standard output or error any more; what they still hold goes nowhere."""
    is_any_closed = False
    for stream in (sys.stdout, sys.stderr):
        watch = select.poll()
        watch.register(stream.fileno(), select.POLLOUT)
        if any(event & select.POLLERR for _, event in watch.poll(0)):
            is_any_closed = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return is_any_closed


def usage() -> str:
    """The overview of commands."""
    lines = [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "trainer: fine-tune a language model while watching what it says",
            "",
            "usage: trainer COMMAND [OPTIONS]        trainer COMMAND --help",
            "",
            *lines,
        ]
    )


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_COMPLETED if words else EXIT_USER_INPUT
    name = words[0]
    if name in ("-V", "--version", "version"):
        print(f"ultimate-trainer {__version__}")
        return EXIT_COMPLETED
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"trainer.commands.{name}")
    code: int = module.run(words[1:])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
