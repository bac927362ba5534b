"""Seconds and peak memory of a loss and its gradients: logits in tiles against all at once.

    python benchmarks/bench_loss.py [--blocks 5] [--tokens 2048] [--vocabulary 151936]

A Qwen3-shaped model of one small layer, so that the head is nearly all of the work; bf16 weights
are left out, because a CPU computes them otherwise than a GPU does. Every arm is a process of its
own; arms take turns, and the order turns round from block to block. The peak is that of the step,
over the memory before it (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ARMS = ("all at once", "in tiles")


def measure(arm: str, tokens: int, vocabulary: int) -> None:
    """Print seconds and MiB of one step, the second of two."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from trainer.core.loss import PostHead, Tiling, supervised_loss

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, vocabulary, (1, tokens))
    tiling = Tiling.of(PostHead(), vocabulary) if arm == "in tiles" else None

    def step() -> float:
        loss = supervised_loss(model, model, {"input_ids": ids, "labels": ids}, tiling=tiling)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    step()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_mib(), time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mib": peak_mib() - before, "loss": loss}))


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
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        measure(options.arm, options.tokens, options.vocabulary)
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for block in range(options.blocks):
        for arm in ARMS if block % 2 else ARMS[::-1]:
            words = [sys.executable, __file__, "--arm", arm, "--tokens", str(options.tokens)]
            words += ["--vocabulary", str(options.vocabulary)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
    for name in ("seconds", "mib"):
        for arm, values in found.items():
            numbers = sorted(value[name] for value in values)
            print(
                f"{name:<8}{arm:<12} median {statistics.median(numbers):8.2f}, "
                f"{numbers[0]:.2f} to {numbers[-1]:.2f}"
            )
        ratios = sorted(
            tiled[name] / whole[name]
            for whole, tiled in zip(*(found[arm] for arm in ARMS), strict=True)
        )
        print(
            f"{name:<8}tiles / all  median {statistics.median(ratios):8.2f}, "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        )
    print("losses", sorted({round(value["loss"], 5) for arm in ARMS for value in found[arm]}))


if __name__ == "__main__":
    main()
