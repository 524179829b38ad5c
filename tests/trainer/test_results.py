"""QATTrainer: what comes out of a training: checkpoints to resume from, and converted copies."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from hf_qat.errors import StageError, WeightsError
from hf_qat.model.state import state_of
from hf_qat.trainer.trainer import QATTrainer
from tests.models import LABELS, resnet, segformer, spread, swin
from tests.training import FOLLOWED, arguments, differing, images, prepared, trainer_of, values, values_in, vit


def vit_with_dropout() -> nn.Module:
    """So that random numbers matter."""
    return vit(hidden_dropout_prob=0.1)


def dinov2() -> nn.Module:
    """One layer, 16 patches."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    config = transformers.Dinov2Config(**sizes, image_size=32, patch_size=8, num_labels=LABELS)
    return spread(transformers.Dinov2ForImageClassification(config))


#: Models with other names in files than in memory; slow together.
OTHERS = (swin, dinov2, segformer)


class TestResuming:
    @pytest.mark.parametrize(
        ("make", "scheme"),
        [
            (vit_with_dropout, {}),
            pytest.param(vit_with_dropout, FOLLOWED, marks=pytest.mark.slow),
            pytest.param(resnet, {}, marks=pytest.mark.slow),
            pytest.param(resnet, FOLLOWED, marks=pytest.mark.slow),
            pytest.param(segformer, {}, marks=pytest.mark.slow),
        ],
        ids=["vit learned", "vit followed", "resnet learned", "resnet followed", "segformer learned"],
    )
    def test_a_resumed_training_ends_with_the_same_bits(self, tmp_path: Path, make, scheme: dict):
        def train(resume: str | None = None) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            model = make() if make is segformer else prepared(make, **scheme)
            data = images(12)
            if make is segformer:
                masks = (torch.arange(12 * 32 * 32) % LABELS).view(12, 32, 32)
                data = [{"pixel_values": p, "labels": m} for p, m in zip(data["pixel_values"][:], masks, strict=True)]
            changes = {"max_steps": 6, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
            trainer = trainer_of(
                model, tmp_path, qat=scheme, train_dataset=data, save_strategy="steps", save_steps=3, **changes
            )
            trainer.train(resume_from_checkpoint=resume)
            return values(trainer.model)

        straight = train()
        assert differing(straight, values_in(tmp_path / "checkpoint-6")) == []
        assert differing(straight, train(str(tmp_path / "checkpoint-3"))) == []

    def test_a_checkpoint_that_lacks_weights_is_refused(self, tmp_path: Path):
        trainer_of(prepared(vit), tmp_path, save_strategy="steps", save_steps=2).train()
        checkpoint = tmp_path / "checkpoint-2"
        state = values_in(checkpoint)
        del state["classifier.bias"]
        state["classifier.biases"] = torch.zeros(LABELS)
        save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=r"missing keys \(classifier.bias\).* keys \(classifier.biases\)"):
            trainer_of(prepared(vit), tmp_path).train(resume_from_checkpoint=str(checkpoint))

    @pytest.mark.parametrize("make", [vit, pytest.param(resnet, marks=pytest.mark.slow)])
    def test_a_float_training_in_the_same_directory_is_not_resumed(self, tmp_path: Path, make: Callable):
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
        transformers.Trainer(make(), args, train_dataset=images(16)).train()
        trainer = trainer_of(prepared(make), tmp_path)
        with pytest.raises(WeightsError, match="checkpoint-2 is a checkpoint of a float training.*from_pretrained"):
            trainer.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        "make", [vit, *(pytest.param(m, marks=pytest.mark.slow) for m in (swin, dinov2, segformer))]
    )
    def test_no_weight_is_lost_where_transformers_has_other_names_in_files(
        self, tmp_path: Path, make: Callable[[], nn.Module]
    ):
        make().save_pretrained(tmp_path / "float")
        if values_in(tmp_path / "float").keys() == make().state_dict().keys():
            pytest.skip("the names are the same in this release of transformers")

        def train(place: Path, model: nn.Module, resume: Path | None) -> QATTrainer:
            scores = count(0, -1)  # the first checkpoint is the best
            changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
            best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
            more = {"compute_metrics": lambda prediction: {"score": next(scores)}, "train_dataset": data}
            trainer = trainer_of(model, place, max_steps=2, eval_dataset=data[:2], **more, **changes, **best)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            return trainer

        pixels, mask = images(8)["pixel_values"][:], (torch.arange(32 * 32) % LABELS).view(32, 32)
        data = [{"pixel_values": p, "labels": mask if make is segformer else k % LABELS} for k, p in enumerate(pixels)]
        trainer = train(tmp_path / "straight", make(), None)
        first = values_in(tmp_path / "straight" / "checkpoint-1")
        assert differing(values(trainer.model), first) == []
        other = make()
        for parameter in other.parameters():
            parameter.data += 1.0
        train(tmp_path / "resumed", other, tmp_path / "straight" / "checkpoint-1")
        second = [values_in(tmp_path / place / "checkpoint-2") for place in ("straight", "resumed")]
        assert differing(*second) == [] and differing(first, second[0])

    def test_save_model_writes_what_the_model_is(self, tmp_path: Path):
        trainer = trainer_of(prepared(vit), tmp_path)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        assert differing(values(trainer.model), values_in(tmp_path / "final")) == []
        config = json.loads((tmp_path / "final" / "config.json").read_text())
        assert config["architectures"] == ["ViTForImageClassification"]


class TestConverting:
    @pytest.mark.parametrize(
        "changes", [pytest.param({}, marks=pytest.mark.slow), {"bf16": True}], ids=["float32", "bf16"]
    )
    def test_it_gives_a_copy_and_training_can_go_on(self, tmp_path: Path, changes: dict):
        trainer = trainer_of(prepared(resnet), tmp_path, **changes)
        trainer.train()
        before = values(trainer.model)
        converted = trainer.convert()
        assert state_of(converted).stage == "converted" and state_of(trainer.model).stage == "prepared"
        pixels = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            logits = converted(pixels).logits
            # The forward of the class, which mixed precision has not wrapped.
            assert torch.equal(logits, type(converted).forward(converted, pixels).logits)
            assert torch.equal(logits, trainer.model.eval()(pixels).logits)
        assert differing(before, values(trainer.model)) == []
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
        assert torch.equal(converted(pixels).logits, logits)  # nothing of the copy hangs on the original
        trainer.train()

    def test_a_model_without_ranges_is_refused(self, tmp_path: Path):
        with pytest.raises(StageError, match="no range yet"):
            trainer_of(prepared(vit), tmp_path).convert()
