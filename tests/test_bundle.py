"""The one form in which a trained model leaves a run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.batches import pad_ids
from vinedresser.bundle import (
    Bundle,
    load_bundle,
    refuse_other_pieces,
    save_bundle,
    vocabulary_of,
    warm_start,
)
from vinedresser.config import Decoding, Experiment
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.data.tokenizers.tokenizer import NUM_SPECIAL, Symbols
from vinedresser.decode import beam_search, greedy
from vinedresser.errors import ConfigError, DamagedError, DataError
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import head_gates
from vinedresser.pruning.heads import count_heads, pruning_experiment
from vinedresser.special_ids import EOS, UNK
from vinedresser.workspace.commit import commit

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
SENTENCES = ["a b c", "f", "d e f a b", "c c", "a b c d e f a b c"]


@pytest.fixture(scope="module")
def experiment(reversal: ShardSet) -> Experiment:
    return Experiment.from_json(
        {"task": reversal.task.to_json(), "model": {"kind": "transformer", **TINY}}
    )


def built(experiment: Experiment, shards: ShardSet, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    joint = shards.task.has_joint_vocabulary
    model = experiment.model.build(vocabulary_of(*tokenizers(shards), joint=joint)).eval()
    for name, parameter in model.named_parameters():
        if "gates" not in name:  # loud enough that sentences differ in what they become
            torch.nn.init.normal_(parameter, std=0.5)
    model.output.bias.data[: UNK + 1] = -100.0
    return model


@pytest.fixture(scope="module")
def saved(experiment, reversal, tmp_path_factory) -> Path:
    model = built(experiment, reversal)
    return save_bundle(
        tmp_path_factory.mktemp("bundle") / "bundle",
        experiment=experiment,
        weights=model.state_dict(),
        tokenizers=tokenizers(reversal),
        scores={"metric": "per", "dev": {"per": 12.5}},
    )


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def bundle(saved) -> Bundle:
    return load_bundle(saved)


def test_what_was_saved_is_loaded(bundle, saved, experiment, reversal):
    model = built(experiment, reversal)
    assert bundle.folder == saved
    assert bundle.experiment == experiment
    assert bundle.scores == {"metric": "per", "dev": {"per": 12.5}}
    assert not bundle.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(bundle.model.state_dict()[name], tensor)
    assert bundle.source_tokenizer.encode("a b") == tokenizers(reversal)[0].encode("a b")
    assert (saved / "weights.safetensors").is_file()
    assert not any(path.suffix in {".pt", ".pkl", ".bin"} for path in saved.iterdir())


def test_a_digest_names_the_content(bundle, saved, experiment, reversal, tmp_path):
    def digest(seed: int, name: str) -> str:
        model = built(experiment, reversal, seed)
        target = save_bundle(
            tmp_path / name,
            experiment=experiment,
            weights=model.state_dict(),
            tokenizers=tokenizers(reversal),
            scores={"metric": "per", "dev": {"per": 12.5}},
        )
        return load_bundle(target).digest

    assert digest(0, "same") == bundle.digest
    assert digest(1, "other") != bundle.digest


def test_a_bundle_that_is_there_is_left_as_it_is(folder, experiment, reversal):
    before = load_bundle(folder).digest
    save_bundle(
        folder,
        experiment=experiment,
        weights=built(experiment, reversal, seed=1).state_dict(),
        tokenizers=tokenizers(reversal),
        scores={},
    )
    assert load_bundle(folder).digest == before


class TestTranslate:
    @pytest.mark.parametrize("beam", [1, 3])
    def test_equals_the_search_one_sentence_at_a_time(self, bundle, beam):
        cap = bundle.experiment.task.max_target_length
        alpha = bundle.experiment.decoding.length_alpha
        decoding, wanted = bundle.experiment.decoding.override({"beam": beam}), []
        for text in SENTENCES:
            source = pad_ids([[*bundle.source_tokenizer.encode(text), EOS]])
            decoded = (
                greedy(bundle.model, *source, cap=cap)
                if beam == 1
                else beam_search(
                    bundle.model, *source, Decoding(beam=beam, length_alpha=alpha), cap=cap
                )
            )
            wanted.append(bundle.target_tokenizer.decode(decoded.ids[0]))
        assert bundle.translate(SENTENCES, decoding) == wanted
        assert bundle.translate(SENTENCES[::-1], decoding) == wanted[::-1]

    def test_more_sentences_than_a_batch_keep_their_order(self, bundle):
        one = dict(zip(SENTENCES, bundle.translate(SENTENCES), strict=True))
        assert len(set(one.values())) > 3
        many = [SENTENCES[i % 5] for i in range(150)]
        assert bundle.translate(many) == [one[text] for text in many]

    def test_nothing_to_translate(self, bundle):
        assert bundle.translate([]) == []

    @pytest.mark.parametrize("text", ["", "   "])
    def test_an_empty_sentence_is_refused(self, bundle, text):
        with pytest.raises(DataError, match="line 2: nothing to read"):
            bundle.translate(["a", text])

    def test_the_longest_sentence_is_read_and_a_longer_one_refused(self, bundle):
        limit = bundle.experiment.task.max_source_length
        assert len(bundle.translate([" ".join("a" * (limit - 1))])) == 1
        with pytest.raises(DataError, match=f"line 1: {limit + 1} tokens; wanted 1 to {limit - 1}"):
            bundle.translate([" ".join("a" * limit)])

    def test_an_unknown_symbol_is_read_as_such(self, bundle):
        assert len(bundle.translate(["a zebra b"])) == 1


@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "experiment.json", "scores.json", "source.json", "manifest.json"],
)
def test_one_changed_byte_is_refused(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "target.json", "manifest.json"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(DamagedError):
        load_bundle(folder)


def test_another_kind_of_folder_is_refused(reversal, tmp_path):
    with pytest.raises(DataError, match="not a model bundle"):
        load_bundle(reversal.folder)
    with pytest.raises(DamagedError, match="incomplete"):
        load_bundle(tmp_path)
    with pytest.raises(DamagedError):
        load_bundle(tmp_path / "nowhere")


def copied(folder: Path, target: Path, **meta: object) -> Path:
    """A committed folder with the same files and another account of them."""
    with commit(target) as staging:
        for path in folder.iterdir():
            shutil.copy(path, staging.path)
        staging.meta |= {"kind": "bundle", "format": 1, **meta}
    return target


def test_another_format_is_refused(saved, tmp_path):
    with pytest.raises(DataError, match=r"bundle format 99, this version reads 1"):
        load_bundle(copied(saved, tmp_path / "new", format=99))


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    plain = json.loads((folder / "experiment.json").read_text())
    plain["model"]["d_ff"] = 64
    (folder / "experiment.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match=r"do not fit the model: .*size mismatch"):
        load_bundle(copied(folder, tmp_path / "wide"))


class TestWarmStart:
    """methods.md 76, 83."""

    def test_every_weight_is_taken(self, bundle, experiment, reversal):
        model = built(experiment, reversal, seed=5)
        account = warm_start(model, bundle, experiment.model)
        for name, tensor in bundle.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert account == f"warm start: {len(model.state_dict())} tensors of {bundle.folder}"
        with torch.no_grad():
            next(model.parameters()).add_(1)
        assert not torch.equal(next(model.parameters()), next(bundle.model.parameters()))

    def test_gates_that_are_new_stay_open_and_change_no_output(self, bundle, reversal):
        config = pruning_experiment(
            bundle, {"objective.head_penalty.weight": 0.5}, kinds=["enc_self", "dec_enc"]
        )
        assert config.init == str(bundle.folder)
        model = built(config, reversal, seed=5)
        account = warm_start(model, bundle, config.model)
        assert "2 gates, fresh and open: encoder.0.enc_self.gates" in account
        assert "1 of the model's settings changed: concrete_heads [] -> ['enc_self'" in account
        assert len(head_gates(model)) == 2
        assert all(h.kept == h.total and not h.undecided for h in count_heads(model).values())
        source = pad_ids([[4, 5, 6, EOS], [7, EOS]])
        states = [m.encode(*source).states_BSD for m in (model, bundle.model)]
        assert torch.equal(*states)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model.d_ff": 64}, r"0 tensors missing, 0 unknown, 6 of another shape"),
            ({"model.encoder_layers": 2}, r"\d+ tensors missing, 0 unknown, 0 of another shape"),
            ({"model.norm": "post"}, r"0 tensors missing, 4 unknown, 0 of another shape"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_refused_and_left_alone(
        self, bundle, experiment, reversal, changes, message
    ):
        config = experiment.override(changes)
        model = built(config, reversal, seed=5)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(DataError, match=message + r".*use the same model section"):
            warm_start(model, bundle, config.model)
        assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())

    def test_a_part_is_taken_on_request_with_an_account_of_the_rest(
        self, bundle, experiment, reversal
    ):
        wide = {"model.d_ff": 64, "model.encoder_layers": 2, "model.norm": "post"}
        config = experiment.override(wide)
        model = built(config, reversal, seed=5)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        given = bundle.model.state_dict()
        account = warm_start(model, bundle, config.model, partial=True).splitlines()
        taken = 0
        for name, tensor in model.state_dict().items():
            fits = name in given and given[name].shape == tensor.shape
            assert torch.equal(tensor, given[name] if fits else before[name])
            taken += fits
        assert account[0] == f"warm start: {taken} tensors of {bundle.folder}"
        names = model.state_dict().keys()
        missing = [name for name in names if name not in given]
        unknown = [name for name in given if name not in names]
        kinds = [line.strip().split(": ")[0] for line in account[1:]]
        assert kinds == [
            f"{len(missing)} missing there, fresh",
            f"{len(names) - len(missing) - taken} of another shape, fresh",
            f"{len(unknown)} unknown here, left out",
            "3 of the model's settings changed",
        ]
        assert missing[0] in account[1]
        assert re.search(r"encoder\.0\.feed_forward\.\S+ \d+x\d+ for 64x\d+", account[2])
        assert unknown[0] in account[3]
        assert account[4].endswith("d_ff 32 -> 64, encoder_layers 1 -> 2, norm pre -> post")

    @pytest.mark.parametrize("heads", [1, 4])
    def test_other_heads_are_refused_and_taken_on_request(
        self, bundle, experiment, reversal, heads
    ):
        """All shapes are equal, the function is not."""
        config = experiment.override({"model.num_heads": heads})
        model = built(config, reversal, seed=5)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(
            ConfigError,
            match=rf"model\.num_heads: found {heads}, \S+ has 2, .*Fix: model\.num_heads=2, or",
        ):
            warm_start(model, bundle, config.model)
        assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
        account = warm_start(model, bundle, config.model, partial=True).splitlines()
        assert account[1:] == [f"  1 of the model's settings changed: num_heads 2 -> {heads}"]
        source = pad_ids([[4, 5, 6, EOS], [7, EOS]])
        states = [m.encode(*source).states_BSD for m in (model, bundle.model)]
        assert not torch.allclose(*states, atol=0.1)

    def test_settings_of_equal_shapes_are_told_and_dropout_is_not(
        self, bundle, experiment, reversal
    ):
        changes = {"activation": "gelu", "positions": "none", "dropout": 0.3}
        config = experiment.override({f"model.{key}": value for key, value in changes.items()})
        account = warm_start(built(config, reversal), bundle, config.model).splitlines()
        wanted = "activation relu -> gelu, positions sinusoidal -> none"
        assert account[1:] == [f"  2 of the model's settings changed: {wanted}"]

    @pytest.mark.parametrize("partial", [False, True])
    def test_different_tensors_do_not_become_one(self, experiment, reversal, tmp_path, partial):
        untied = experiment.override({"model.tie": "none"})
        saved = save_bundle(
            tmp_path / "untied",
            experiment=untied,
            weights=built(untied, reversal).state_dict(),
            tokenizers=tokenizers(reversal),
            scores={},
        )
        model = built(experiment, reversal, seed=5)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        message = (
            r"target_embedding\.weight and output\.weight are one tensor here, and differ in .*"
            r"untied; Fix: model\.tie=none"
        )
        with pytest.raises(ConfigError, match=message):
            warm_start(model, load_bundle(saved), experiment.model, partial=partial)
        assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())

    def test_one_tensor_may_become_two(self, bundle, experiment, reversal):
        config = experiment.override({"model.tie": "none"})
        model = built(config, reversal, seed=5)
        account = warm_start(model, bundle, config.model).splitlines()
        assert account[1:] == ["  1 of the model's settings changed: tie output -> none"]
        for name, tensor in bundle.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert model.output.weight is not model.target_embedding.weight


def test_a_bundle_of_other_pieces_is_refused(bundle):
    source, target = bundle.source_tokenizer, bundle.target_tokenizer
    refuse_other_pieces(bundle, source, target)
    others = Symbols("symbols", [f"other{i}" for i in range(target.size - NUM_SPECIAL)])
    assert others.size == target.size
    with pytest.raises(DataError, match=r"its target tokenizer is .* mean other pieces"):
        refuse_other_pieces(bundle, source, others)
