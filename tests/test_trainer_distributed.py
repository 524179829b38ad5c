"""Two processes on the CPU, started as `accelerate launch` starts them. This file is also the script that they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_qat.trainer import QATTrainer
from tests.models import resnet
from tests.training import arguments, images, recipe


#: Ranges that do not depend on the order of the data.
EXTREMES = {"activations": {"learned": False, "observer": "minmax"}}


def calibrated_and_trained(directory: Path, batch: int) -> dict[str, dict[str, torch.Tensor]]:
    """The model's state after `calibrate()` and after `train()`, on 16 images a calibration."""
    args = arguments(directory, per_device_train_batch_size=batch)
    trainer = QATTrainer(resnet(), args, qat_config=recipe(**EXTREMES), train_dataset=images(32), teacher="float")
    trainer.calibrate()
    states = {"calibrated": {key: value.clone() for key, value in trainer.model.state_dict().items()}}
    trainer.train()
    return {**states, "trained": trainer.model.state_dict()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    directory = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launcher, __file__, str(directory)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["calibrated", "trained"])
def test_all_ranks_have_the_same_model(ranks: list, when: str):
    one, other = (rank[when] for rank in ranks)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.slow
def test_two_ranks_find_the_ranges_of_one_that_sees_the_data_of_both(ranks: list, tmp_path: Path):
    alone = calibrated_and_trained(tmp_path, batch=8)["calibrated"]
    together = ranks[0]["calibrated"]
    ranges = [key for key in together if key.endswith(("log2_scale", "offset"))]
    assert ranges
    for key in ranges:
        torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=1e-5, msg=key)


if __name__ == "__main__":
    torch.manual_seed(0)
    out = Path(sys.argv[1])
    torch.save(calibrated_and_trained(out, batch=4), out / f"{os.environ['RANK']}.pt")
