"""Whether an offered manifest fits the loaded model: names, shapes and sizes, without torch.

Nothing has been sent then, and nothing is built.
"""

from __future__ import annotations

from trainer.publish.weight_file import num_bytes
from trainer.publish.wire import TensorEntry, WeightsManifest
from trainer.server.problems import WeightsRefusedError

FLOATS = {"F32", "F16", "BF16"}
"""Dtypes that an fp32 model holds without loss."""

RANK_AXIS = {
    ".lora_A.weight": 0,
    ".lora_B.weight": 1,
    ".lora_embedding_A": 0,
    ".lora_embedding_B": 1,
}
"""Where the rank stands in the shape of each kind of adapter tensor."""


def check_fit(manifest: WeightsManifest, expected: WeightsManifest) -> None:
    """Compare an offer with the loaded model; the base of an adapter is the store's to know.

    Raises:
        WeightsRefusedError: another architecture or tokenizer, or other tensors.
    """
    for name, code in (
        ("config_hash", "other_architecture"),
        ("tokenizer_hash", "other_tokenizer"),
        ("chat_template_hash", "other_chat_template"),
    ):
        if getattr(manifest, name) != getattr(expected, name):
            raise WeightsRefusedError(
                409,
                code,
                f"{name} is not that of the loaded model; start the server with the base "
                "model of the run (trainer serve --model ...)",
            )
    if manifest.kind == "adapter":
        _check_adapter(manifest, expected)
        return
    mine = {entry.name: entry for entry in expected.tensors}
    bad = sorted(
        {entry.name for entry in manifest.tensors if not _fits(entry, mine.get(entry.name))}
        | (set(mine) - {entry.name for entry in manifest.tensors})
    )
    if bad:
        raise WeightsRefusedError(
            422, "tensors_differ", "tensors are missing or of another shape or dtype", bad
        )


def _fits(entry: TensorEntry, mine: TensorEntry | None) -> bool:
    if mine is None or entry.shape != mine.shape:
        return False
    return entry.dtype == mine.dtype or {entry.dtype, mine.dtype} <= FLOATS


def _check_adapter(manifest: WeightsManifest, expected: WeightsManifest) -> None:
    """An adapter must be as large as its manifest says: rank, modules and tensors agree.

    Every detail is compared in the engine, on a model without memory; this is what keeps a
    manifest of a few bytes from asking for gigabytes there.
    """
    adapter = manifest.adapter
    assert adapter is not None, "the manifest's own check"
    if sum(map(num_bytes, manifest.tensors)) > sum(map(num_bytes, expected.tensors)):
        raise WeightsRefusedError(413, "too_large", "an adapter larger than its model")
    bad = [entry.name for entry in manifest.tensors if not _is_of_rank(entry, adapter.r)]
    if bad:
        raise WeightsRefusedError(
            422,
            "tensors_differ",
            f"tensors are not those of an adapter of rank r={adapter.r}; offer the rank that the "
            "adapter was trained with",
            bad,
        )
    # Targets are full names; `base_model.model.` stands before them.
    places = {entry.name.partition(".lora_")[0] for entry in manifest.tensors}
    without = [
        target
        for target in adapter.target_modules
        if not any(place == target or place.endswith("." + target) for place in places)
    ]
    if without:
        raise WeightsRefusedError(
            422, "tensors_differ", "target_modules without tensors in the manifest", without[:100]
        )


def _is_of_rank(entry: TensorEntry, rank: int) -> bool:
    if entry.dtype not in FLOATS:
        return False
    for ending, axis in RANK_AXIS.items():
        if entry.name.endswith(ending):
            return len(entry.shape) == 2 and entry.shape[axis] == rank
    return ".modules_to_save." in entry.name and ".lora_" not in entry.name
