"""How often the weights of a bundle are hashed per command."""

import json
from pathlib import Path

import pytest
import torch

from vinedresser.bundle import save_bundle, vocabulary_of
from vinedresser.cli import main
from vinedresser.config import Experiment
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.workspace import commit

# MLflow's own imports warn (sqlalchemy's noload, pydantic, ...); none of it is ours to change.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

TINY = {"d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}


def saved(folder: Path, shards: ShardSet, per: float) -> Path:
    plain = {"task": shards.task.to_json(), "model": {"kind": "transformer", **TINY}}
    experiment, both = Experiment.from_json(plain), tokenizers(shards)
    torch.manual_seed(0)
    joint = shards.task.has_joint_vocabulary
    model = experiment.model.build(vocabulary_of(*both, joint=joint))
    scores = {
        "metric": "per", "reference_digest": "r", "test": {"per": per},
    }  # fmt: skip
    return save_bundle(
        folder, experiment=experiment, weights=model.state_dict(), tokenizers=both, scores=scores
    )


@pytest.mark.slow
def test_a_command_hashes_each_copy_of_a_bundle_once(reversal, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.json").write_text(json.dumps(reversal.task.to_json()))
    good, better = (saved(tmp_path / "models" / str(per), reversal, per) for per in (0.3, 0.2))
    hashed, file_digest = [], commit.file_digest

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(commit, "file_digest", counting)

    def times(*words: str) -> int:
        """Of the weights, in one command."""
        hashed.clear()
        assert main([*words, "--workspace", "w"]) == 0, capsys.readouterr().err
        capsys.readouterr()
        return hashed.count("weights.safetensors")

    # The bundle, what the registry returns of it, and the champion that it is compared with.
    assert times("export", str(good), "m") == 2
    assert times("export", str(good), "m") == 2
    assert times("export", str(better), "m") == 3
    assert times("evaluate", str(good), "task.json", "split=dev") == 1
    # Downloaded, then cached.
    assert times("evaluate", "models:/m@champion", "task.json", "split=dev") == 1
    assert times("evaluate", "models:/m@champion", "task.json", "split=dev") == 1
