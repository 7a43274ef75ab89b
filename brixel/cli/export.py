"""`brixel export`: a model as one file for other engines."""

import argparse
from pathlib import Path
from typing import Any

from brixel.cli.options import add_flag, add_model_names, add_output, command, given, height_by_width, load, print_json
from brixel.inference.export.formats import FORMATS


def add(commands: Any) -> None:
    """Add the command."""
    text = "write a model as an ONNX file or a program of torch.export, and compare it with the model"
    parser = command(commands, "export", _export, text, "brixel export --model brixel-small -o model.onnx")
    add_output(parser, required=True, metavar="FILE")
    add_flag(parser, "--format", choices=tuple(FORMATS), help="file format", usual="by the ending: .onnx or .pt2")
    text = "a file for one size of images, in place of any number and size"
    parser.add_argument("--static", action="store_true", help=text)
    text = "with --static: the size in pixels"
    add_flag(
        parser,
        "--image-hw",
        type=height_by_width,
        metavar="HxW",
        help=text,
        usual="a square, as the adapter was trained",
    )
    add_flag(parser, "--batch-size", default=1, note="with --static")
    add_flag(parser, "--scale", usual="4; trained adapters of the first generation have no other")
    text = "version of the operators of ONNX, 18 to 23"
    add_flag(parser, "--opset", type=int, metavar="N", help=text, default=18)
    parser.add_argument("--no-verify", action="store_true", help="do not run the file to compare it with the model")
    add_flag(parser, "--json")
    add_flag(parser, "--dtype", default="auto", note="also of input and output", usual="auto, float32")
    add_model_names(parser)


def _export(options: argparse.Namespace) -> int:
    dtype = None if options.dtype == "auto" else options.dtype
    options.dtype, options.device = "float32", "cpu"
    written = load(options).export(
        Path(options.output),
        dynamic=not options.static,
        batch=options.batch_size,
        dtype=dtype,
        verify=not options.no_verify,
        **given(options, "format", "image_hw", "scale", "opset"),
    )
    if options.json:
        print_json({"file": str(written.path), **written.facts})
    else:
        print(written)
    return 0
