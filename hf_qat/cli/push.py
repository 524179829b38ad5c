"""`hf-qat push`: a directory to the Hub, with TI's compiled artifacts if there are any."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_qat.cli.options_file import parse_with_config


def main(argv: Sequence[str]) -> None:
    """Push a directory and print the address of the commit.

    Args:
        argv: what follows `hf-qat push`.

    Raises:
        HfQatError: nothing to push, artifacts of another model, or the Hub refuses.
        OSError: a file cannot be read.
        SystemExit: wrong options, or `--help`.
    """
    options = parse_with_config(_parser(), argv)
    from hf_qat.publish.hub import COMMIT_MESSAGE, push_directory
    from hf_qat.tidl.artifacts import add_artifacts

    if options.artifacts is not None:
        print(f"packed into {add_artifacts(options.directory, options.artifacts)}")
    commit = push_directory(
        options.directory,
        options.repo,
        token=options.token,
        private=options.private or None,
        revision=options.revision,
        commit_message=options.message or COMMIT_MESSAGE,
        create_pr=options.create_pr,
        path_in_repo=options.path_in_repo,
        ignore=options.ignore,
    )
    print(commit.pr_url or commit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-qat push",
        description="Upload a directory to a model repository on the Hugging Face Hub, which is made if it is not "
        "there, in one commit. What the Hub has already is not sent again; after any trouble, push once more. Left "
        "out are hidden and temporary files, checkpoint-*, _* and training_args.bin.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", type=Path, help="what save_quantized, export or save_pretrained wrote")
    parser.add_argument("repo", help="user/model, or model for the user of the token")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="a branch, made if it is not there (default: main)")
    parser.add_argument("--create-pr", "--create_pr", action="store_true", help="open a pull request")
    parser.add_argument(
        "--path-in-repo", "--path_in_repo", default="", metavar="PATH", help="put the files into this directory there"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="leave out such names in the directory too"
    )
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--token", help="instead of the one of `hf auth login` or HF_TOKEN")
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="what compile.py of a TIDL bundle wrote: checked and packed into that bundle of the directory first",
    )
    return parser
