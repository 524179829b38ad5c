"""A user's script that pushes while it trains, exports, and pushes what it exported.

torchrun --nproc_per_node 2 publish.py DIRECTORY
"""

import os
import sys
from pathlib import Path

import torch

from tests.exported import publisher
from tests.training import images


def main(directory: Path) -> None:
    """Train with a push after each of two saves, then publish; what each process came to is left for the test."""
    torch.manual_seed(0)
    hub = {"push_to_hub": True, "hub_model_id": "user/trained", "hub_always_push": True}
    training = {"max_steps": 96, "save_strategy": "steps", "save_steps": 48, "train_dataset": images(200)}
    trainer = publisher(directory / "run", "AM68A", **training, **hub)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.export(directory / "export", license="apache-2.0")
    commit = trainer.push_to_hub()
    found = {"accuracy": accuracy, "commit": None if commit is None else commit.oid}
    torch.save(found, directory / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
