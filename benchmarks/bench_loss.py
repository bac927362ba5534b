"""Seconds and peak memory of a loss and its gradients: logits in tiles against all at once.

    python benchmarks/bench_loss.py [--blocks 5] [--tokens 2048] [--vocabulary 151936]
        [--hidden 128] [--tiles 192 441] [--live]

A Qwen3-shaped model of one small layer, so that the head is nearly all of the work; bf16 weights
are left out, because a CPU computes them otherwise than a GPU does. Every arm is a process of its
own; arms take turns, and the order turns round from block to block. The peak is that of the step,
over the memory before it (Linux). `--tiles` are positions in a tile, each an arm of its own;
without it tiles are as long as in training. `--live` counts instead the bytes of tensors that are
alive at once in a step of the loss alone: no layers, and gradients of parameters left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WHOLE = "all at once"


def measure(arm: str, options: argparse.Namespace) -> None:
    """Print seconds and MiB of one step, the second of two.

    Args:
        arm: WHOLE, or the positions of a tile.
        options: of the command line.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from trainer.core.loss import supervised_loss
    from trainer.core.tiles import PostHead, Tiling

    vocabulary = options.vocabulary
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        intermediate_size=128,
        num_hidden_layers=0 if options.live else 1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, vocabulary, (1, options.tokens))
    tiling = None if arm == WHOLE else Tiling(PostHead(), int(arm))

    def step() -> float:
        loss = supervised_loss(model, model, {"input_ids": ids, "labels": ids}, tiling=tiling)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    step()
    if options.live:
        print(json.dumps({"mib": live_mib(model, step)}))
        return
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_mib(), time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mib": peak_mib() - before, "loss": loss}))


def live_mib(model: Any, step: Callable[[], float]) -> float:
    """Most MiB of tensors that are alive at once in a step, beside parameters and gradients."""
    from trainer.core.fake_step import LiveBytes

    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}  # a gradient is made transposed

    class LossBytes(LiveBytes):  # type: ignore[no-untyped-call]
        def _count(self, tensor: Any) -> None:
            if tuple(tensor.shape) in shapes:
                self.ignore([tensor])
            super()._count(tensor)

    live = LossBytes()
    live.ignore([*model.parameters(), *model.buffers()])
    with live:
        step()
    return live.peak / 2**20


def peak_mib() -> float:
    """Highest resident memory since it was last reset."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Measure, and print medians, ranges and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tiles", type=int, nargs="*")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        measure(options.arm, options)
        return
    tiles = options.tiles or [usual_tile(options.vocabulary)]
    arms = [WHOLE, *map(str, tiles)]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for block in range(1 if options.live else options.blocks):
        for arm in arms if block % 2 else arms[::-1]:
            words = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
    for name in ("mib",) if options.live else ("seconds", "mib"):
        for arm, values in found.items():
            told(f"{name:<8}{arm}", [value[name] for value in values])
        for arm in arms[1:]:
            pairs = zip(found[WHOLE], found[arm], strict=True)
            told(f"{name:<8}{arm} / all", [tiled[name] / whole[name] for whole, tiled in pairs])
    if not options.live:
        losses = {round(value["loss"], 5) for values in found.values() for value in values}
        print("losses", sorted(losses))


def usual_tile(vocabulary: int) -> int:
    """Positions of a tile in training on a CPU."""
    from trainer.core.tiles import tile_length

    return tile_length(vocabulary, "cpu")


def told(what: str, values: list[float]) -> None:
    """One line: the median and the range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    print(f"{what:<24} median {middle:8.2f}, {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
