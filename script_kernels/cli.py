"""The command `script-kernels`: `demo` draws what pruning does, `calibrate` searches options, `info` tells versions."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

# What the extra `demo` lists: no index has this package, so its extras cannot be named.
DEMO_COMMAND = "pip install matplotlib scikit-image"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status: 0, or 1 where an extra is missing. Bad arguments exit with 2."""
    parser, demo, calibrate = _parsers()
    arguments = parser.parse_args(argv)
    if arguments.command == "calibrate":
        return _calibrate(calibrate, arguments)
    return _demo(demo, arguments) if arguments.command == "demo" else _info(arguments.json)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(prog="script-kernels", description="Visual-token pruning kernels.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="prune a photograph's patches and draw what each stage did",
        description="Takes a region of a photograph as the question, prunes its patches, writes one picture.",
    )
    demo.add_argument(
        "--image", type=Path, metavar="PATH", help="your own picture (default: one that scikit-image ships)"
    )
    demo.add_argument(
        "--box",
        type=_box,
        metavar="x,y,w,h",
        help="the question's region in pixels (default for your own picture: its middle)",
    )
    demo.add_argument("--keep", type=int, default=64, help="patches to keep (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo.png"), metavar="PATH", help="default: %(default)s")
    demo.add_argument(
        "--html", type=Path, metavar="PATH", help="also writes a page that shows each patch's numbers at the pointer"
    )
    demo.add_argument("--grid", type=int, default=24, help="patches a side (default: %(default)s)")
    demo.add_argument(
        "--model", metavar="PATH_OR_ID", help="visual features of this transformers model; not with --box"
    )
    demo.add_argument(
        "--text", default="What is in this picture?", help="the question with --model (default: %(default)s)"
    )
    calibrate = commands.add_parser(
        "calibrate",
        help="find, on your own pictures and questions, the selection that changes a model least",
        description="Compares a transformers model's next-token distributions, pruned and unpruned; needs no labels.",
    )
    calibrate.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a transformers model")
    calibrate.add_argument("--images", required=True, type=Path, metavar="DIR")
    calibrate.add_argument(
        "--questions", required=True, type=Path, metavar="FILE", help="lines of a file name in DIR, a tab, a question"
    )
    calibrate.add_argument("--keep", type=int, default=64, help="tokens to keep of each image (default: %(default)s)")
    calibrate.add_argument("--budget", type=int, metavar="N", help="pruned runs at most (default: 16 a candidate)")
    calibrate.add_argument("--tokens", type=int, default=4, help="of each answer, to compare (default: %(default)s)")
    calibrate.add_argument(
        "--output", type=Path, default=Path("calibration.json"), metavar="PATH", help="default: %(default)s"
    )
    calibrate.add_argument("--plot", type=Path, metavar="PATH", help="also draws the table; needs matplotlib")
    info = commands.add_parser("info", help="versions, libraries loaded or why not, what the machine offers")
    info.add_argument("--json", action="store_true", help="the same as one JSON object, for programs and bug reports")
    return parser, demo, calibrate


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, w, h = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected four whole numbers x,y,w,h, got {text!r}") from None
    return x, y, w, h


def _demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        from script_kernels import demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("script_kernels"):
            raise
        missing = error.name.partition(".")[0]
        print(f"{parser.prog}: {missing} is not installed: {DEMO_COMMAND}", file=sys.stderr)
        return 1
    if arguments.model and arguments.box:
        parser.error("--box: expected none with --model, whose question is --text")
    try:
        demo.run(
            arguments.image,
            arguments.box,
            arguments.keep,
            arguments.grid,
            arguments.output,
            arguments.model,
            arguments.text,
            arguments.html,
        )
    except demo.InputError as error:
        parser.error(str(error))
    return 0


def _calibrate(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        from script_kernels.transformers.calibrate import calibrate_folder
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("script_kernels"):
            raise
        print(f"{parser.prog}: {error.name} is not installed: pip install transformers pillow", file=sys.stderr)
        return 1

    def progress(done: int, most: int) -> None:
        print(f"{done} of at most {most} pruned runs", file=sys.stderr)

    try:
        # What a run that was cut has seen serves only a run on the same questions.
        asked = f"{arguments.model} {arguments.images} {arguments.tokens}\n{arguments.questions.read_text('utf-8')}"
        digest = hashlib.sha256(asked.encode()).hexdigest()[:12]
        seen = arguments.output.with_name(f"{arguments.output.name}.{digest}.seen")
        found = calibrate_folder(
            arguments.model,
            arguments.images,
            arguments.questions,
            keep=arguments.keep,
            budget=arguments.budget,
            first_tokens=arguments.tokens,
            path=seen,
            progress=progress,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found.save(arguments.output)
    seen.unlink(missing_ok=True)
    if arguments.plot:
        found.plot(arguments.plot)
    print(found.table())
    print(f"{arguments.output}: {found.best.name}")
    return 0


def _info(as_json: bool) -> int:
    from script_kernels.info import collect

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
