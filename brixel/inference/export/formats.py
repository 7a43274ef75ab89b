"""The file formats: each writes a traced program with its facts, reads the facts back, and runs the file on the CPU."""

import contextlib
import itertools
import logging
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from brixel.errors import BrixelError, DamagedFileError
from brixel.inference.export.facts import INPUT, KEY, OUTPUT, as_text, parse_facts
from brixel.inference.export.tracing import quiet
from brixel.utils.extras import import_extra
from brixel.utils.out_of_memory import is_out_of_memory
from brixel.utils.structured_files import check_regular

Run = Callable[[Tensor], Tensor]
"""A loaded file: pixels (B, 3, H, W) in, features out, on the CPU."""
_LARGEST_IN_ONE = 2**31 - 2**26  # bytes; a protobuf message ends at 2 GiB
_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


class FileFormat(ABC):
    """A format of exported files."""

    ending: str
    dtypes: tuple[torch.dtype, ...]

    @abstractmethod
    def convert(self, program: ExportedProgram, opset: int) -> Any:
        """The content of a file, from a traced program."""

    @abstractmethod
    def write(self, content: Any, facts: Mapping[str, Any], path: Path) -> None:
        """Write the content with its facts."""

    @abstractmethod
    def read_facts(self, path: Path) -> dict[str, Any]:
        """The facts in a file. Raises DamagedFileError where there are none."""

    @abstractmethod
    def load(self, path: Path, threads: int | None = None) -> Run:
        """Load a file to run it, with as many threads as torch where None."""

    @abstractmethod
    def engine(self) -> str:
        """What runs the file, with its version."""


class OnnxFormat(FileFormat):
    """ONNX, run by ONNX Runtime."""

    ending = ".onnx"
    dtypes = (torch.float32, torch.float16)

    def convert(self, program: ExportedProgram, opset: int) -> Any:
        """The program in ONNX, without what the exporter notes of our code."""
        for module in ("onnx", "onnxscript"):
            import_extra(module, extra="onnx", purpose="exports to ONNX")
        with torch.no_grad(), quiet(), _silent_loggers():
            content: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        found = content.model.opset_imports.get("")
        if found != opset:
            raise BrixelError(f"this model could be written with opset {found} alone, not {opset}; give opset={found}")
        for part in (content.model, content.model.graph, *content.model.graph.all_nodes()):
            part.metadata_props.clear()  # traces of calls, with paths of this machine
        for node in content.model.graph.all_nodes():
            for value in node.outputs:
                value.metadata_props.clear()
                value.shape = None  # torch's own names for free sizes
        return content

    def write(self, content: Any, facts: Mapping[str, Any], path: Path) -> None:
        """Write the file; weights of more than 2 GiB go into a second one, with `.data` behind its name."""
        model = content.model
        for value, name in ((model.graph.inputs[0], "input"), (model.graph.outputs[0], "output")):
            value.shape = type(model.graph.inputs[0].shape)(facts[name]["shape"])
        model.producer_name, model.producer_version = "brixel", facts["version"]
        model.metadata_props[KEY] = as_text(facts)
        weights_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        content.save(str(path), external_data=weights_bytes > _LARGEST_IN_ONE)

    def read_facts(self, path: Path) -> dict[str, Any]:
        """The facts in the metadata of the file."""
        onnx = import_extra("onnx", extra="onnx", purpose="files of ONNX")
        check_regular(path)
        try:
            content = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # protobuf raises errors of its own
            if is_out_of_memory(error):
                raise
            raise DamagedFileError(f"{path} is damaged or no ONNX file; export the model again") from error
        found = {entry.key: entry.value for entry in content.metadata_props}
        if KEY not in found:
            raise DamagedFileError(f"{path} was not exported by brixel: its metadata has no entry {KEY!r}")
        return parse_facts(found[KEY], path)

    def load(self, path: Path, threads: int | None = None) -> Run:
        """A session of ONNX Runtime on the CPU."""
        runtime = import_extra("onnxruntime", extra="onnx", purpose="runs of ONNX files")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # classes of its own
            if is_out_of_memory(error):
                raise
            raise DamagedFileError(f"ONNX Runtime cannot load {path}: {error}") from error
        return lambda pixels: torch.from_numpy(session.run(None, {INPUT: pixels.numpy()})[0])

    def engine(self) -> str:
        """ONNX Runtime and its version."""
        runtime = import_extra("onnxruntime", extra="onnx", purpose="runs of ONNX files")
        return f"ONNX Runtime {runtime.__version__}"


class TorchFormat(FileFormat):
    """A program of `torch.export`, run by torch; ``torch.export.load(path).module()`` loads it without brixel."""

    ending = ".pt2"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def convert(self, program: ExportedProgram, opset: int) -> Any:
        """The program, without the traces of our calls, which name paths of this machine."""
        graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
        for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):
            node.meta.pop("stack_trace", None)
        return program

    def write(self, content: Any, facts: Mapping[str, Any], path: Path) -> None:
        """Write the file."""
        with quiet():
            torch.export.save(content, path, extra_files={f"{KEY}.json": as_text(facts)})

    def read_facts(self, path: Path) -> dict[str, Any]:
        """The facts in an entry of the archive; no program is loaded."""
        check_regular(path)
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"/{KEY}.json")]
                content = archive.read(names[0]).decode() if names else None
        except (zipfile.BadZipFile, UnicodeDecodeError, OSError, NotImplementedError, RuntimeError) as error:
            raise DamagedFileError(f"{path} is damaged or no file of torch.export ({error})") from error
        if content is None:
            raise DamagedFileError(f"{path} was not exported by brixel: it has no entry {KEY}.json")
        return parse_facts(content, path)

    def load(self, path: Path, threads: int | None = None) -> Run:
        """The program as a module, in this process and its threads."""
        with quiet():
            module = torch.export.load(path).module()

        def run(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                features: Tensor = module(pixels)
            return features

        return run

    def engine(self) -> str:
        """The version of torch."""
        return f"torch {torch.__version__}"


FORMATS: Mapping[str, FileFormat] = {"onnx": OnnxFormat(), "torch": TorchFormat()}
"""The formats by name."""


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of an exported file, by its ending. Raises DamagedFileError where it holds none."""
    return next(kind for kind in FORMATS.values() if kind.ending == path.suffix).read_facts(path)


def is_exported(path: Path) -> bool:
    """Whether a path has the ending of an exported file."""
    return path.suffix in {kind.ending for kind in FORMATS.values()}


@contextlib.contextmanager
def _silent_loggers() -> Iterator[None]:
    """Without what the exporter logs, such as that torchvision is not installed."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
