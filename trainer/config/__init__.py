from trainer.config.schema import *
from trainer.config.resolve import resolve


def create_default_config(*, model_path, dataset_path, output_dir, **o):
    for k, s, f in (
        ("model", "model_path", model_path),
        ("data", "dataset_path", dataset_path),
        ("output", "output_dir", output_dir),
    ):
        o[k] = {**o.get(k, {}), s: f}
    return TrainerConfig.model_validate(o)
