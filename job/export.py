"""Export of a trained network for other frameworks: ONNX, safetensors, or torchvision's `models.alexnet`.

In: a checkpoint of job.train. Out: an .onnx file that takes RGB pixels 0..255 and subtracts the mean image itself; a
.safetensors file of the weights with what is needed to use them in its metadata; or a .pth file of weights under
torchvision's names.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from job.inference.options import add_network
from shards.command import Parser, run
from shards.errors import InputError
from shards.machine.files import check_writable

if TYPE_CHECKING:
    from job.network.alexnet import AlexNet
    from job.run.checkpoint import RunState


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(prog="python -m job.export", description="Export a trained network for other frameworks.")
    add_network(parser)
    parser.add_argument("--format", required=True, choices=("onnx", "safetensors", "torchvision"))
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    return parser.parse_args(arguments)


def export_onnx(state: "RunState", model: "AlexNet", path: str) -> None:
    """Write an ONNX graph: `pixels` (N, 3, S, S) float32 RGB 0..255, centre crop -> `scores` (N, classes)."""
    import torch

    # The exporter reports packages and internals of PyTorch that do not concern this network.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install -e '.[export]'") from None

    class FromPixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model
            self.register_buffer("mean", state.mean)

        def forward(self, pixels):
            return self.network(pixels - self.mean)

    example = torch.zeros(2, *state.mean.shape)
    torch.onnx.export(
        FromPixels().eval(),
        (example,),
        path,
        input_names=["pixels"],
        output_names=["scores"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("images", min=1)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def export_safetensors(state: "RunState", model: "AlexNet", path: str) -> None:
    """Write weights under their names in the model, `mean` (3, S, S), and settings and class names as metadata."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install -e '.[export]'") from None
    metadata = {"config": json.dumps(state.config), "classes": json.dumps(state.classes)}
    save_file({**model.state_dict(), "mean": state.mean}, path, metadata={"format": "pt", **metadata})


def export_torchvision(state: "RunState", model: "AlexNet", path: str) -> None:
    """Write a state dict for `torchvision.models.alexnet(num_classes=N)`, whose input is normalised as theirs."""
    import torch

    from job.network.torchvision import to_torchvision

    torch.save(to_torchvision(model.state_dict()), path)


def check_torchvision(state: "RunState", path: str) -> None:
    """Raise InputError unless torchvision's `models.alexnet` has the layers of a checkpoint."""
    layout, width = (
        state.config.get(f"model.{name}", value) for name, value in (("layout", "alexnet"), ("width", 1.0))
    )
    if layout != "torchvision" or width != 1:
        what = f"--model.width {width}" if layout == "torchvision" else f"--model.layout {layout}"
        raise InputError(
            f"{path} is a network of {what}, which torchvision does not have; train with --recipe torchvision, or "
            "export to onnx or safetensors"
        )


def main() -> None:
    """The command."""
    options = parse()
    check_writable(options.out)
    from job.run import checkpoint

    path, state = checkpoint.load_named(options.run, options.checkpoint)
    if options.format == "torchvision":
        check_torchvision(state, path)
    size = sum(value.numel() for value in state.model.values())
    print(f"{path}: writing {size:,} weights as {options.format} ...", file=sys.stderr, flush=True)
    model = checkpoint.network(state, path)
    temporary = f"{options.out}.{os.getpid()}.tmp"
    try:
        formats = {"onnx": export_onnx, "safetensors": export_safetensors, "torchvision": export_torchvision}
        formats[options.format](state, model, temporary)
        os.replace(temporary, options.out)
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {error.strerror or error}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    print(f"{path} -> {options.out}, {os.path.getsize(options.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
