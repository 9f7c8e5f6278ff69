"""``python -m benchmarks.zoo list`` and ``python -m benchmarks.zoo export NAME… -o FOLDER``."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from benchmarks.zoo import ZOO
from mmopt.errors import MmoptError, UserError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or the exit code of the first error.
    """
    options = _parser().parse_args(arguments)
    try:
        return _list() if options.command == "list" else _export(options)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _list() -> int:
    width = max(map(len, ZOO))
    for model in ZOO.values():
        missing = model.missing()
        print(f"{model.name:{width}}  {model.description}{f'  [unavailable: {missing} is missing]' if missing else ''}")
    return 0


def _export(options: argparse.Namespace) -> int:
    for name in options.names:
        if name not in ZOO:
            raise UserError(f"there is no model {name!r}", hint=did_you_mean(name, ZOO))
    for name in options.names:
        print(ZOO[name].export(options.output, batch=options.batch, dynamic=options.dynamic), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="The reference models.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and what they are")
    export = commands.add_parser("export", help="write models as ONNX to FOLDER/NAME/")
    export.add_argument("names", nargs="+", metavar="NAME")
    export.add_argument("-o", "--output", type=pathlib.Path, required=True, metavar="FOLDER")
    shape = export.add_mutually_exclusive_group()
    shape.add_argument("--batch", type=int, default=1, metavar="N", help="static batch size (default 1)")
    shape.add_argument("--dynamic", action="store_true", help="leave batch and lengths symbolic")
    return parser


if __name__ == "__main__":
    sys.exit(main())
