"""The live page in the seven cases that it must make plain at first sight, (a) to (g).

    python -m benchmarks.case_pictures ROWS.jsonl --out FOLDER [--docs docs/img]
    python -m benchmarks.case_pictures --run a=FOLDER --run b=FOLDER --out FOLDER

Each case is taken at 1440x900 and 390x844, light and dark: `FOLDER/a-wide-light.png`. ROWS are
those of GSM8K: a tiny model is trained on them for (a), and the demo for (b), unless `--run` names
a run made before; (c) to (g) are made up (made_up_runs.py). `--docs` keeps small copies of the
wide light ones as `case-a.png` and of one phone. Scripts that no font of this machine draws show
as boxes. Needs Chromium, and Pillow for `--docs`.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Error as PlaywrightError

from benchmarks.made_up_runs import make_all
from benchmarks.screenshots import chromium, command, wait_for_step

MADE_UP = {
    "c": "hundred_prompts",
    "d": "not_a_number",
    "e": "hung",
    "f": "killed",
    "g": "scripts",
}
SIZES = {"wide": (1440, 900, 1.0), "phone": (390, 844, 2.0)}
SCHEMES = ("light", "dark")
DEMO_STEPS = 82
"""The demo is taken at about this step: right and wrong answers stand side by side."""
TRAIN = "--model tiny --data.max_rows 2000 --max-steps 160 --batch-size 8 --learning-rate 0.005"
PREVIEWS = (
    "--monitoring.inference_interval 10 --monitoring.num_eval_samples 6 "
    "--monitoring.preview_max_tokens 96 --monitoring.final_eval_prompts 12"
)
PORT = "18089"
WAIT_MS = 2_500
NUM_COLOURS = 256
PHONE_CASE = "c"
"""Of this one the dark phone is kept too."""


def main() -> int:
    """Make what is not there, then take the pictures."""
    words = arguments()
    words.out.mkdir(parents=True, exist_ok=True)
    given = dict(one.split("=", 1) for one in words.run)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        root = Path(scratch)
        make_all(root / "made")
        runs = {case: root / "made" / name for case, name in MADE_UP.items()}
        runs |= {case: Path(path) for case, path in given.items()}
        if "a" not in runs:
            runs["a"] = train_gsm8k(words.rows, root)
        if "b" not in runs:
            runs["b"] = root / "demo_run"
            stack.enter_context(command("demo", "--output", "demo_run", cwd=root))
            wait_for_step(runs["b"], 1)
        browser = stack.enter_context(chromium())
        for case in sorted(runs, key=lambda case: (case != "b", case)):  # the demo goes on
            if case in words.cases:
                until = DEMO_STEPS if case == "b" and "b" not in given else 0
                take_case(browser, case, runs[case], words.out, until)
    if words.docs is not None:
        words.docs.mkdir(parents=True, exist_ok=True)
        for case in words.cases:
            keep_small(words.out / f"{case}-wide-light.png", words.docs / f"case-{case}.png")
            if case == PHONE_CASE:
                phone = words.docs / f"case-{case}-phone.png"
                keep_small(words.out / f"{case}-phone-dark.png", phone)
    return 0


def train_gsm8k(rows: Path, root: Path) -> Path:
    """160 steps of a tiny model on real word problems: minutes on a CPU."""
    # From within: the pictures name the folder as a user would.
    target = ("--dataset", str(rows.resolve()), "--output", "gsm8k_tiny")
    with command("train", *target, *TRAIN.split(), *PREVIEWS.split(), cwd=root) as training:
        if training.wait() != 0:
            raise SystemExit("the run on GSM8K failed; its words stand above")
    return root / "gsm8k_tiny"


def take_case(browser: Any, case: str, run: Path, out: Path, until: int = 0) -> None:
    """The four pictures of one run, as whoever opens the page sees it, at that step at least."""
    with command("monitor", str(run), "--port", PORT), contextlib.ExitStack() as stack:
        pages = {}
        for size, (width, height, scale) in SIZES.items():
            for scheme in SCHEMES:
                page = browser.new_page(
                    viewport={"width": width, "height": height},
                    color_scheme=scheme,
                    device_scale_factor=scale,
                )
                stack.callback(page.close)
                open_page(page, f"http://127.0.0.1:{PORT}/")
                pages[out / f"{case}-{size}-{scheme}.png"] = page
        wait_for_step(run, until)
        page.wait_for_timeout(WAIT_MS)  # until the pages know
        # All at one moment: a run that trains goes on.
        for path, page in pages.items():
            page.screenshot(path=path)
            print(path, flush=True)


def open_page(page: Any, url: str) -> None:
    """Open the page of a run as a visitor finds it; its monitor may still be starting."""
    for _ in range(60):
        with contextlib.suppress(PlaywrightError):
            page.goto(url)
            break
        time.sleep(0.5)
    page.wait_for_selector(".row-line")  # it opens on the newest wrong answer
    page.wait_for_timeout(WAIT_MS)
    page.evaluate("window.scrollTo(0, 0)")


def keep_small(source: Path, target: Path) -> None:
    """A copy with a palette: a third of the size, and nothing that one would see is lost."""
    from PIL import Image

    with Image.open(source) as picture:
        # By octree: a median cut gives the few pixels of a marked word the colour of others.
        small = picture.convert("RGB").quantize(
            NUM_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    small.save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("rows", type=Path, nargs="?", help="gsm8k_train.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="folder for small copies")
    parser.add_argument("--cases", default="abcdefg", help="letters [abcdefg]")
    parser.add_argument(
        "--run", action="append", default=[], metavar="CASE=FOLDER", help="a run made before"
    )
    words = parser.parse_args()
    known = all(one[:1] in "abcdefg" and one[1:2] == "=" for one in words.run)
    if not known or not set(words.cases) <= set("abcdefg"):
        parser.error("a case is one of the letters a to g")
    if words.rows is None and not any(one.startswith("a=") for one in words.run):
        parser.error("case a needs the rows of GSM8K, or --run a=FOLDER")
    if shutil.which("chromium") is None and shutil.which("chromium-browser") is None:
        parser.error("there is no chromium here: apt-get install chromium")
    return words


if __name__ == "__main__":
    raise SystemExit(main())
