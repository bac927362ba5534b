"""stand-in"""

import json

from trainer.errors import OutputError


def environment_manifest():
    return {}


class RunFolder:
    RUN_JSON = "run.json"
    CHECKPOINTS = "checkpoints"
    FINAL_MODEL = "final_model"
    notices = ()

    def __init__(self, p):
        self.path = p

    @classmethod
    def create(cls, p, *, resume):
        if (p / "run.json").exists() and not resume:
            raise OutputError("holds a run")
        p.mkdir(parents=True, exist_ok=True)
        return cls(p)

    run_json = property(lambda s: s.path / "run.json")
    config_resolved = property(lambda s: s.path / "config.resolved.json")
    checkpoints_dir = property(lambda s: s.path / "checkpoints")
    final_model_dir = property(lambda s: s.path / "final_model")
    logs_dir = property(lambda s: s.path / "logs")
    final_evaluation_jsonl = property(lambda s: s.path / "final_evaluation.jsonl")

    def write_json(self, p, d):
        p.write_text(json.dumps(d))

    def update_json(self, p, d):
        p.write_text(json.dumps({**json.loads(p.read_text()), **d}))

    def discard_if_empty(self):
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def close(self):
        pass
