"""`hub_strategy`: what is on the Hub after training, in spite of troubles, and what is said when it is not."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from hf_qat.cli import main as cli
from hf_qat.errors import PublishError
from hf_qat.trainer.trainer import QATTrainer
from tests.hub.faults import ALWAYS
from tests.hub.server import HubServer
from tests.training import arguments, images, prepared, trainer_of, values, vit


pytestmark = pytest.mark.usefixtures("waits")


class Tiny(PreTrainedModel):
    """The smallest model that Trainer can train."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig(architectures=["Tiny"]))
        self.head = nn.Sequential(nn.Linear(3, 5))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(pixel_values.mean((2, 3)))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


@pytest.fixture
def trainer(hub, tmp_path):
    """Makes a trainer that saves, and pushes to user/model, after each of three steps."""

    def make(**changes: object) -> QATTrainer:
        hub_options = {"push_to_hub": True, "hub_model_id": "user/model", "save_strategy": "steps", "save_steps": 1}
        args = arguments(tmp_path / "out", **{**hub_options, "max_steps": 3, **changes})
        return QATTrainer(Tiny(), args, train_dataset=images(16, size=8), eval_dataset=images(4, size=8))

    return make


class Release(TrainerCallback):
    """Lets the Hub go on with the first commit when the last step is done."""

    def __init__(self, hub: HubServer) -> None:
        self.done = threading.Event()
        hub.plant("commit", until=self.done, lost=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.done.set()


@pytest.fixture
def repository(hub):
    return lambda: hub.repository("user/model")


def titles(repository) -> list[str]:
    return [commit.title for commit in repository.commits()]


def is_on_hub(model: nn.Module, repository, path: str = "model.safetensors") -> bool:
    stored = load(repository.files()[path])
    return all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


class TestWithoutTrouble:
    def test_the_model_of_each_save_is_pushed_if_every_push_is_waited_for(self, trainer, repository):
        made = trainer(hub_always_push=True)
        made.train()
        assert titles(repository()) == [f"Training in progress, step {step}" for step in (1, 2, 3)]
        assert set(repository().files()) == {"config.json", "model.safetensors"}
        assert is_on_hub(made.model, repository())

    @pytest.mark.slow
    def test_a_push_that_comes_due_during_another_is_left_out_but_the_newest_model_arrives(
        self, hub, trainer, repository, caplog
    ):
        made = trainer()
        made.add_callback(Release(hub))
        made.train()
        assert titles(repository()) == [f"Training in progress, step {step}" for step in (1, 3)]
        assert is_on_hub(made.model, repository())
        assert "not on the Hub" not in caplog.text

    def test_the_last_checkpoint_is_pushed_to_resume_from(self, trainer, repository):
        made = trainer(hub_strategy="checkpoint")
        made.train()
        files = repository().files()
        state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        assert set(files) == {
            *("config.json", "model.safetensors"),
            *(f"last-checkpoint/{name}" for name in ("config.json", "model.safetensors", *state)),
        }
        assert b'"global_step": 3' in files["last-checkpoint/trainer_state.json"]
        assert is_on_hub(made.model, repository(), "last-checkpoint/model.safetensors")

    @pytest.mark.slow
    def test_all_checkpoints_are_pushed_those_too_that_were_left_out_at_first(self, hub, trainer, repository):
        made = trainer(hub_strategy="all_checkpoints")
        made.add_callback(Release(hub))
        made.train()
        files = repository().files()
        for step in (1, 2, 3):
            checkpoint = Path(made.args.output_dir, f"checkpoint-{step}", "model.safetensors")
            assert files[f"checkpoint-{step}/model.safetensors"] == checkpoint.read_bytes()
        assert is_on_hub(made.model, repository())

    def test_the_token_is_in_nothing_that_is_pushed_or_said(self, hub, trainer, repository, tmp_path, caplog, capfd):
        token = "hf_" + "aB3xY7zQ" * 4
        hub.users[token] = hub.users[hub.token]
        made = trainer(hub_token=token, hub_strategy="checkpoint")
        with caplog.at_level(logging.DEBUG, "hf_qat"):
            hub.plant("commit", times=1, status=500)
            made.train()
            made.create_model_card()
        assert repository().files()
        assert not [name for name, content in repository().files().items() if token.encode() in content]
        local = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "training_args.bin"]
        assert not [path for path in local if token.encode() in path.read_bytes()]
        assert token not in caplog.text and token not in "".join(capfd.readouterr())

    @pytest.mark.slow
    def test_nothing_is_pushed_before_the_end_if_so_wanted(self, trainer, repository):
        trainer(hub_strategy="end").train()
        assert titles(repository()) == []

    def test_an_earlier_export_is_no_part_of_it(self, trainer, repository, tmp_path):
        (tmp_path / "out" / "export").mkdir(parents=True)
        (tmp_path / "out" / "export" / "config.json").write_text("{}")
        (tmp_path / "out" / "README.md").write_text("---\ntags: [qat]\n---\n")
        trainer().train()
        assert set(repository().files()) == {"README.md", "config.json", "model.safetensors"}

    @pytest.mark.slow
    def test_branch_and_privacy_are_those_of_the_arguments(self, trainer, repository):
        trainer(hub_revision="v2", hub_private_repo=True).train()
        assert repository().private and repository().files() == {} and "config.json" in repository().files("v2")


class TestTroubles:
    @pytest.mark.parametrize(
        ("endpoint", "fault"),
        [
            ("create_repo", dict(status=500, times=2)),
            ("commit", dict(status=500, times=2)),
            ("commit", dict(drop=True, lost=True)),
            ("lfs_put", dict(drop=True)),
        ],
        ids=["repository", "commit", "answer lost", "upload"],
    )
    def test_those_that_pass_leave_no_trace(self, endpoint, fault, hub, trainer, repository, caplog):
        hub.plant(endpoint, **fault)
        made = trainer(hub_always_push=True)
        made.train()
        assert is_on_hub(made.model, repository()) and len(titles(repository())) == 3
        assert "not on the Hub" not in caplog.text

    @pytest.mark.slow
    def test_one_that_passes_before_the_end_is_reported_at_once_and_made_good(self, hub, trainer, repository, caplog):
        hub.plant("commit", status=403, message="storage limit reached")
        made = trainer(save_steps=3)

        class Listener(TrainerCallback):
            """Looks at the log while training is still going on."""

            def on_train_end(self, args, state, control, **kwargs):
                made.push_in_progress.wait_until_done()
                assert "A checkpoint is not on the Hub" in caplog.text and "storage limit reached" in caplog.text

        made.add_callback(Listener())
        made.train()
        assert is_on_hub(made.model, repository())
        assert "The training is done" not in caplog.text

    def test_one_that_lasts_leaves_the_result_and_a_command_that_completes_it(self, hub, trainer, repository, caplog):
        hub.plant("commit", times=ALWAYS, status=500)
        made = trainer()
        output = made.train()
        assert output.global_step == 3 and titles(repository()) == []
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert errors[-1].startswith("The training is done and saved, but what it gave is not all on the Hub: ")
        assert all("A checkpoint is not on the Hub" in error for error in errors[:-1]) and len(errors) > 1
        uploads = hub.count("lfs_put")

        hub.faults.clear()
        program, *words = shlex.split(errors[-1].split("To go on:\n")[1])
        assert program == "hf-qat" and cli.main(words) == 0
        assert is_on_hub(made.model, repository()) and hub.count("lfs_put") == uploads

    @pytest.mark.slow
    def test_a_checkpoint_that_was_deleted_before_it_could_be_pushed_is_named(
        self, hub, trainer, repository, caplog, tmp_path
    ):
        made = trainer(hub_strategy="all_checkpoints", save_total_limit=1)
        made.add_callback(Release(hub))
        made.train()
        assert f"{tmp_path / 'out' / 'checkpoint-2'} is not on the Hub, and was deleted meanwhile" in caplog.text
        assert is_on_hub(made.model, repository(), "checkpoint-3/model.safetensors")

    @pytest.mark.slow
    def test_a_checkpoint_that_is_being_pushed_is_not_deleted(self, hub, trainer, repository, caplog):
        made = trainer(hub_strategy="all_checkpoints", save_total_limit=1)
        made.add_callback(Release(hub))
        made.train()
        state = repository().files()["checkpoint-1/trainer_state.json"]
        assert b'"global_step": 1,' in state
        assert "checkpoint-1 is not on the Hub" not in caplog.text and "A checkpoint is not" not in caplog.text

    @pytest.mark.slow
    def test_one_that_training_deletes_at_its_end_is_pushed_before(self, trainer, monkeypatch, caplog):
        """The first checkpoint is the best, and the only one that may stay: Trainer itself deletes the last."""
        scores, found = iter([3.0, 2.0, 1.0]), []

        def push(directory: Path, repo_id: str, **options: object) -> None:
            time.sleep(0.5)
            found.append((directory.name, sorted(path.name for path in directory.glob("*.json"))))

        monkeypatch.setattr("hf_qat.trainer.pushing.push_directory", push)
        made = trainer(
            hub_strategy="all_checkpoints",
            hub_always_push=True,
            save_total_limit=1,
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="score",
        )
        made.compute_metrics = lambda prediction: {"score": next(scores)}
        made.train()
        checkpoints = [(name, files) for name, files in found if name.startswith("checkpoint-")]
        assert checkpoints == [(f"checkpoint-{k}", ["config.json", "trainer_state.json"]) for k in (1, 2, 3)]
        assert [path.name for path in Path(made.args.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]

    @pytest.mark.parametrize(
        ("fault", "message"),
        [(dict(status=401), "user/model could not be made: the Hub does not accept the token"), (None, "is public")],
        ids=["token", "public although private is wanted"],
    )
    def test_a_repository_that_cannot_be_had_is_an_error_before_training(self, fault, message, hub, trainer):
        if fault is None:
            trainer()
        else:
            hub.plant("create_repo", **fault)
        with pytest.raises(PublishError, match=message):
            trainer(hub_private_repo=True)


@pytest.mark.slow
def test_qat_trainer_resumes_bit_for_bit_from_the_checkpoint_on_the_hub(hub, tmp_path):
    hub_options = {"push_to_hub": True, "hub_model_id": "user/vit", "hub_strategy": "checkpoint"}
    first = trainer_of(prepared(vit), tmp_path / "a", save_strategy="steps", save_steps=2, **hub_options)
    first.train()
    stopped = Path(snapshot_download("user/vit", revision=hub.repository("user/vit").commits()[1].oid))
    assert '"global_step": 2,' in (stopped / "last-checkpoint" / "trainer_state.json").read_text()
    again = trainer_of(prepared(vit), tmp_path / "b")
    again.train(resume_from_checkpoint=str(stopped / "last-checkpoint"))
    expected = values(first.model)
    assert again.state.global_step == 4
    assert all(torch.equal(value, expected[key]) for key, value in values(again.model).items())
