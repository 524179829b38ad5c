"""Checkpoints and models that are there as a whole or not at all; what is killed is in test_resuming.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification, Trainer, TrainerState
from transformers.trainer_utils import HubStrategy, get_last_checkpoint

from hf_qat.files.atomic import INCOMPLETE, discard, put_back, put_in_place, written_whole
from hf_qat.trainer.saving import delete_older
from hf_qat.trainer.trainer import QATTrainer
from tests.training import arguments, differing, images, prepared, trainer_of, values, values_in, vit


def files_in(directory: Path) -> set[str]:
    """Paths of all files, at any depth."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def steps_in(directory: Path) -> list[int]:
    """Numbers of the checkpoints."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*"))


class TestCheckpoints:
    def test_they_hold_the_files_that_trainer_writes_and_nothing_else_is_there(self, tmp_path: Path):
        for kind, model, place in ((Trainer, vit(), "plain"), (QATTrainer, prepared(vit), "ours")):
            args = arguments(tmp_path / place, max_steps=2, save_strategy="steps", save_steps=1)
            kind(model, args, train_dataset=images(8)).train()
        assert files_in(tmp_path / "plain") == files_in(tmp_path / "ours")
        assert steps_in(tmp_path / "ours") == [1, 2]

    def test_one_has_no_name_before_it_is_complete(self, tmp_path: Path):
        class Full(Exception):
            pass

        class FullDisk(QATTrainer):
            full = True

            def _save_rng_state(self, output_dir: str) -> None:  # one of the last files
                if self.full and self.state.global_step == 2:
                    raise Full
                super()._save_rng_state(output_dir)

        args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
        trainer = FullDisk(prepared(vit), args, train_dataset=images(16))
        with pytest.raises(Full):
            trainer.train()
        assert (tmp_path / INCOMPLETE / "checkpoint-2" / "model.safetensors").exists()
        assert steps_in(tmp_path) == [1] and get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        trainer.full = False
        trainer.train(resume_from_checkpoint=True)
        assert steps_in(tmp_path) == [1, 2, 3] and not (tmp_path / INCOMPLETE).exists()

    def test_the_latest_and_the_best_are_kept(self, tmp_path: Path):
        scores = iter([1.0, 3.0, 2.0, 2.0, 2.0])
        trainer = trainer_of(
            prepared(vit),
            tmp_path,
            compute_metrics=lambda prediction: {"score": next(scores)},
            metric_for_best_model="score",
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            max_steps=4,
            save_total_limit=2,
            load_best_model_at_end=True,
        )
        trainer.train()
        assert steps_in(tmp_path) == [2, 4]
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        for step in (2, 4):
            assert (
                f'"best_model_checkpoint": "{tmp_path / "checkpoint-2"}"'
                in (tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text()
            )
        assert differing(values(trainer.model), values_in(tmp_path / "checkpoint-2")) == []

    @pytest.mark.slow
    def test_another_training_in_the_same_directory_replaces_them(self, tmp_path: Path):
        changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        trainer_of(prepared(vit), tmp_path, **changes).train()
        (tmp_path / "checkpoint-2" / "old").touch()
        trainer = trainer_of(prepared(vit), tmp_path, **changes, learning_rate=1e-2)
        trainer.train()
        assert "old" not in files_in(tmp_path / "checkpoint-2")
        assert differing(values(trainer.model), values_in(tmp_path / "checkpoint-2")) == []

    @pytest.mark.slow
    def test_one_that_was_about_to_be_replaced_when_a_training_was_killed_is_there_again(self, tmp_path: Path):
        changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        trainer_of(prepared(vit), tmp_path, **changes).train()
        before = values_in(tmp_path / "checkpoint-1")
        (tmp_path / INCOMPLETE).mkdir()
        (tmp_path / "checkpoint-1").rename(tmp_path / INCOMPLETE / "replaced-checkpoint-1")
        trainer_of(prepared(vit), tmp_path, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert differing(before, values_in(tmp_path / "checkpoint-1")) == []
        assert not (tmp_path / INCOMPLETE).exists()

    def test_one_is_uploaded_under_its_final_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        pushed = []
        monkeypatch.setattr(
            "hf_qat.trainer.pushing.push_directory",
            lambda path, repo_id, **options: pushed.append((path, files_in(path), options.get("path_in_repo"))),
        )
        trainer = trainer_of(prepared(vit), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
        trainer.args.push_to_hub, trainer.args.hub_strategy = True, HubStrategy.CHECKPOINT
        trainer.train()
        assert [(path, place) for path, _, place in pushed] == [
            (tmp_path, None),
            (tmp_path / "checkpoint-2", "last-checkpoint"),
        ]
        assert "trainer_state.json" in pushed[1][1]


class TestDeleting:
    def saved(self, directory: Path, steps: int) -> None:
        """Checkpoints of so many steps, the first one the oldest."""
        for step in range(1, steps + 1):
            (directory / f"checkpoint-{step}").mkdir()
            os.utime(directory / f"checkpoint-{step}", (step, step))

    @pytest.mark.parametrize(
        ("limit", "best", "in_use", "left"),
        [
            (None, None, [], [1, 2, 3, 4]),
            (0, None, [], [1, 2, 3, 4]),
            (2, None, [], [3, 4]),
            (2, 1, [], [1, 4]),
            (1, 1, [], [1, 4]),
            (2, None, [1], [1, 3, 4]),
            (1, None, [2], [2, 4]),
        ],
    )
    def test_the_oldest_go_but_for_the_best_and_those_in_use(
        self, tmp_path: Path, limit: int | None, best: int | None, in_use: list[int], left: list[int]
    ):
        self.saved(tmp_path, 4)
        state = TrainerState(best_model_checkpoint=None if best is None else str(tmp_path / f"checkpoint-{best}"))
        delete_older(state, str(tmp_path), limit, [tmp_path / f"checkpoint-{step}" for step in in_use])
        assert steps_in(tmp_path) == left


class TestModels:
    def test_other_files_stay_and_old_weights_go(self, tmp_path: Path):
        trainer = trainer_of(prepared(vit), tmp_path)
        (tmp_path / "checkpoint-9").mkdir()
        for name in ("notes.txt", "checkpoint-9/kept", "model-00001-of-00002.safetensors", "model_ema.safetensors"):
            (tmp_path / name).touch()
        trainer.save_model()
        assert files_in(tmp_path) == {
            "notes.txt",
            "checkpoint-9/kept",
            "model_ema.safetensors",
            "config.json",
            "model.safetensors",
            "training_args.bin",
        }
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert differing(values(loaded), values(trainer.model)) == []

    def test_an_error_leaves_what_was_there(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ZeroDivisionError), written_whole(tmp_path) as aside:
            (aside / "config.json").write_text("new")
            raise ZeroDivisionError
        assert files_in(tmp_path) == {"config.json"} and (tmp_path / "config.json").read_text() == "{}"

    @pytest.mark.parametrize("sharded", [False, True])
    def test_old_weights_go_first_and_new_ones_come_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
    ):
        seen = []

        def replace(source: Path, target: Path) -> None:
            seen.append((target.name, files_in(tmp_path)))
            source.rename(target)

        monkeypatch.setattr("os.replace", replace)
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "z.json"):
            (tmp_path / name).touch()
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weights = [*shards, "model.safetensors.index.json"] if sharded else ["model.safetensors"]
        with written_whole(tmp_path) as aside:
            for name in (*weights, "a.json", "config.json", "z.json"):
                (aside / name).touch()
        assert [name for name, _ in seen] == ["a.json", "config.json", "z.json", *weights]
        assert all(not {"model.safetensors", "model.safetensors.index.json"} & there for _, there in seen)

    @pytest.mark.slow
    def test_its_class_refuses_it_for_want_of_weights_wherever_the_moving_is_killed_and_it_is_completed_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        # For want of a config.json, the class would take its defaults, which fit some models.
        class Killed(BaseException):
            pass

        trainer = trainer_of(prepared(vit), tmp_path)
        trainer.save_model()
        moves = len(files_in(tmp_path))
        for stop in range(moves):
            done = count()

            def replace(source: Path, target: Path, done: Iterator[int] = done, stop: int = stop) -> None:
                if next(done) >= stop:  # nothing is done after it
                    raise Killed
                source.rename(target)

            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr("os.replace", replace)
                trainer.save_model()
            with pytest.raises(OSError, match="no file named model.safetensors"):
                type(trainer.model).from_pretrained(tmp_path)
            put_back(tmp_path)
            loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
            assert differing(values(loaded), values(trainer.model)) == []


class TestDirectories:
    def test_one_takes_the_place_of_another(self, tmp_path: Path):
        for name in ("aside/new", "place"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / name.replace("/", "-")).touch()
        put_in_place(tmp_path / "aside" / "new", tmp_path / "place")
        assert files_in(tmp_path / "place") == {"aside-new"}

    def test_one_that_is_deleted_is_never_half_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        seen = []
        monkeypatch.setattr("shutil.rmtree", lambda path: seen.append((Path(path).name, steps_in(tmp_path))))
        (tmp_path / "checkpoint-1").mkdir()
        discard(tmp_path / "checkpoint-1")
        assert seen == [(INCOMPLETE, [])]
        discard(tmp_path / "checkpoint-7")  # not there
