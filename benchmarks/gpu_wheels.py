"""Wheels for a machine with a GPU and without a registry: a folder that `make gpu` takes them from.

    python benchmarks/gpu_wheels.py [--python-version 3.12] [--platform manylinux_2_28_x86_64]

Run it where a registry is, then copy the folder with the checkout. It holds at most 56 MiB, in the
order of `WHEELS`; what does not fit is named. `benchmarks/gpu.py` unpacks those that its Python
lacks, or has in another version than `constraints.txt`, into a temporary folder; nothing is
installed. The standard library only: this file runs on both machines.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "gpu-wheels"
MOST_BYTES = 56 * 2**20

TRL = "TRL, where pyarrow and pandas are"
TRL_NEEDS = ("pyarrow", "pandas")
"""Without them `datasets` does not import, and with `datasets` there transformers imports it."""

WHEELS = {
    "a training run": (
        *("transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "peft"),
        *("pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
        *("typing_extensions", "orjson", "psutil", "httpx", "httpcore", "httpx2", "httpcore2"),
        *("truststore", "h11", "anyio", "idna", "certifi", "PyYAML", "regex", "tqdm"),
        *("packaging", "filelock", "fsspec", "xxhash"),
    ),
    "the tests": ("pytest", "pytest-timeout", "pluggy", "iniconfig", "Pygments"),
    "previews from a sidecar": (
        *("fastapi", "starlette", "uvicorn", "httptools", "click", "annotated-doc"),
        *("prometheus_client", "opentelemetry-api"),
    ),
    "where torch came without numpy": ("numpy",),
    TRL: (
        *("trl", "datasets", "dill", "multiprocess", "python-dateutil", "Jinja2"),
        *("requests", "urllib3", "charset-normalizer", "MarkupSafe"),
    ),
}
"""By what needs them, in order of worth. What comes with torch is not here, where any version of it
will do; nor is what only pages, trackers and other commands import."""

TOO_LARGE = {
    "pyarrow": "about 45 MiB; TRL's stages are skipped where the GPU's Python lacks it",
    "pandas": "about 12 MiB, and of use to TRL's stages with pyarrow only",
    "bitsandbytes": "about 60 MiB; the QLoRA stages are skipped where the GPU's Python lacks it",
}

ANY_VERSION = ("numpy",)
"""Compiled against by others: the GPU's Python keeps its own."""


def main() -> int:
    """Fill the folder, and say what is in it and what is not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python-version", default=here, help="of the Python there (as here)")
    parser.add_argument(
        "--platform", default="manylinux_2_28_x86_64", help="of the machine there: its glibc"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    words = parser.parse_args()
    words.folder.mkdir(exist_ok=True)
    names = [name for group in WHEELS.values() for name in group]
    missing = download(words.folder, names, words.python_version, words.platform)
    left_out = fit(words.folder, names, MOST_BYTES)
    for group, members in WHEELS.items():
        held = [path for name in members if (path := wheel_of(words.folder, name))]
        size = sum(path.stat().st_size for path in held) / 2**20
        print(f"{group}: {len(held)} of {len(members)} wheels, {size:.1f} MiB")
    total = sum(path.stat().st_size for path in words.folder.glob("*.whl")) / 2**20
    print(f"{words.folder}: {total:.1f} of {MOST_BYTES / 2**20:.0f} MiB")
    for name in left_out:
        print(f"does not fit: {name}")
    for name, why in TOO_LARGE.items():
        print(f"not fetched: {name} ({why})")
    for name in missing:
        print(f"no wheel for Python {words.python_version} on {words.platform}: {name}")
    return 1 if missing else 0


def download(folder: Path, names: list[str], python: str, platform: str) -> list[str]:
    """Fetch wheels of the pinned versions; the names that have none for that Python."""
    target = [word for tag in tags(platform) for word in ("--platform", tag)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--only-binary=:all:", "--no-deps", "--implementation", "cp"),
        *("--python-version", python, *target, "-c", str(ROOT / "constraints.txt")),
        *("-d", str(folder)),
    ]
    remove_others(folder, names, python)
    if subprocess.run([*command, *names], check=False).returncode == 0:
        return []
    return [name for name in names if subprocess.run([*command, name], check=False).returncode]


def tags(platform: str) -> list[str]:
    """The platforms whose wheels run on this one; pip compares them letter by letter."""
    found = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if found is None:
        return [platform]
    newest, machine = int(found[1]), found[2]
    older = [f"manylinux_2_{number}_{machine}" for number in range(newest, 4, -1)]
    return [*older, *(f"manylinux{year}_{machine}" for year in ("2014", "2010", "1"))]


def remove_others(folder: Path, names: Iterable[str], python: str) -> None:
    """Leave no wheel of an earlier list, version or Python behind."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    wanted = {(plain(name), pin) for name, pin in re.findall(r"(?m)^([\w.-]+)==(\S+)$", pins)}
    listed = {plain(name) for name in names}
    for path in folder.glob("*.whl"):
        name, number, *_ = path.name.split("-")
        is_listed = plain(name) in listed and (plain(name), number) in wanted
        if not is_listed or not runs_on(path, python):
            path.unlink()


def fit(folder: Path, names: Iterable[str], most_bytes: int) -> list[str]:
    """Remove what is over the limit; the names of it, those of most worth stay."""
    left_out, total = [], 0
    for name in names:
        path = wheel_of(folder, name)
        if path is None:
            continue
        if total + path.stat().st_size > most_bytes:
            left_out.append(f"{name} ({path.stat().st_size / 2**20:.1f} MiB)")
            path.unlink()
        else:
            total += path.stat().st_size
    return left_out


# ---- on the machine with the GPU


def lacking(folder: Path) -> list[Path]:
    """Wheels of the folder that this Python lacks, or has in another version.

    Those of TRL only where this Python has what they need besides.

    Raises:
        ValueError: wheels for another Python.
    """
    wanted, here = [], f"{sys.version_info.major}.{sys.version_info.minor}"
    has_rest = all(importlib.util.find_spec(name) is not None for name in TRL_NEEDS)
    useless = set() if has_rest else {plain(name) for name in WHEELS[TRL]}
    for path in sorted(folder.glob("*.whl")):
        if not runs_on(path, here):
            raise ValueError(
                f"{path.name} is not for this Python {here}; fill {folder} again with "
                f"make gpu-wheels GPU_PYTHON_VERSION={here}"
            )
        name, number, *_ = path.name.split("-")
        if plain(name) in useless:
            continue
        try:
            has = version(name)
        except PackageNotFoundError:
            has = None
        if has is None or (has != number and plain(name) not in ANY_VERSION):
            wanted.append(path)
    return wanted


def unpack(wheels: Iterable[Path], site: Path) -> None:
    """Put what they hold where PYTHONPATH can name it."""
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(site)


def wheel_of(folder: Path, name: str) -> Path | None:
    """The wheel of a distribution."""
    found = [one for one in folder.glob("*.whl") if plain(one.name.split("-")[0]) == plain(name)]
    return found[0] if found else None


def runs_on(path: Path, python: str) -> bool:
    """Whether a wheel's tags allow this version of CPython, such as 3.12."""
    pythons, abi = path.stem.split("-")[-3:-1]
    number = python.replace(".", "")
    if abi == "abi3":
        return any(
            int(tag[3:]) <= int(number[1:]) for tag in pythons.split(".") if tag[:3] == "cp3"
        )
    exact = {f"cp{number}", f"py{number}", "py3"}
    return bool(exact & set(pythons.split("."))) and abi in ("none", f"cp{number}")


def plain(name: str) -> str:
    """A distribution's name in its one spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    raise SystemExit(main())
