"""Sources of images as datasets of Ray Data: files and objects, Parquet with a column of bytes, webdataset tars.

A listed source is known image by image before it starts: rows of `image` (the relative path), `path`, `size_bytes` and
`mtime_ns`. A streamed one is read as it goes: rows of `image` and `bytes`, or an `error` where a file cannot be read.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from brixel.errors import BrixelError, did_you_mean
from brixel.extraction.manifest import SourceImage
from brixel.images.find_images import IMAGE_SUFFIXES
from brixel.utils.extras import import_extra

PARQUET_SUFFIXES = (".parquet",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
READ_CPUS = 0.25  # of a task that reads: it mostly waits
_ROWS_PER_READ = 64
_BYTES_COLUMNS = ("bytes", "image", "image_bytes", "jpg", "png", "content")
_NAME_COLUMNS = ("path", "image_path", "file_name", "filename", "name", "key", "__key__", "id")

PathLike = str | Path


def is_uri(path: PathLike) -> bool:
    """Whether a path names an object store, or another file system of pyarrow: "s3://bucket/photos"."""
    return isinstance(path, str) and "://" in path


def import_ray() -> Any:
    """The module `ray`, with `ray.data`. Raises BrixelError where it is not installed."""
    ray = import_extra("ray", extra="ray", purpose="runs on a cluster")
    import_extra("ray.data", extra="ray", purpose="runs on a cluster")
    return ray


def list_objects(uri: str) -> list[tuple[str, SourceImage]]:
    """The images below a URI, sorted: the URI of each, and what it is now. An object itself is its own image.

    Raises:
        BrixelError: The store cannot be reached, or there are no images.
    """
    fs = import_extra("pyarrow.fs", extra="ray", purpose="object stores")
    base, path = _file_system(uri)
    try:
        found = base.get_file_info(path)
        if found.type == fs.FileType.Directory:
            infos = [info for info in base.get_file_info(fs.FileSelector(path, recursive=True)) if info.is_file]
        else:
            infos = [found] if found.is_file else []
    except OSError as error:
        raise BrixelError(f"{uri} cannot be listed ({error}); check its name and your access to it") from error
    scheme = uri.partition("://")[0]
    listed = []
    for info in infos:
        name = PurePosixPath(info.path)
        relative = name.relative_to(path) if found.type == fs.FileType.Directory else PurePosixPath(name.name)
        if name.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in relative.parts):
            listed.append((f"{scheme}://{info.path}", SourceImage(str(relative), info.size, info.mtime_ns or 0)))
    if not listed:
        raise BrixelError(f"no images at {uri}; looked for {', '.join(IMAGE_SUFFIXES)}")
    return sorted(listed, key=lambda pair: pair[1].relative_path.split("/"))


def read_object(uri: str) -> bytes:
    """The bytes of an object. Raises OSError."""
    base, path = _file_system(uri)
    with base.open_input_file(path) as file:
        return bytes(file.read())


def listed_dataset(pending: Sequence[tuple[PathLike, SourceImage]], block_images: int) -> Any:
    """Rows of images, in blocks of so many."""
    ray, pa = import_ray(), import_extra("pyarrow", extra="ray", purpose="runs on a cluster")
    tables = []
    for start in range(0, len(pending), block_images):
        rows = pending[start : start + block_images]
        columns = {
            "image": [source.relative_path for _, source in rows],
            "path": [str(path) for path, _ in rows],
            "size_bytes": [source.size_bytes for _, source in rows],
            "mtime_ns": [source.mtime_ns for _, source in rows],
        }
        tables.append(pa.table(columns))
    return ray.data.from_blocks(tables)  # kept as they are, and described without a task for each


@dataclass(frozen=True)
class StreamedSource:
    """Files that hold many images: Parquet or tars, by their endings."""

    paths: tuple[str, ...]
    bytes_column: str | None = None
    name_column: str | None = None

    def dataset(self) -> Any:
        """Rows of `image`, `bytes` and `error`."""
        ray = import_ray()
        if self.paths[0].endswith(TAR_SUFFIXES):
            files = ray.data.from_items([{"path": path} for path in self.paths], override_num_blocks=len(self.paths))
            return files.map_batches(_read_tars, batch_size=1, num_cpus=READ_CPUS)
        column, field, name = self._columns()
        columns = list(dict.fromkeys((column, name)))
        rows = ray.data.read_parquet(list(self.paths), columns=columns, ray_remote_args={"num_cpus": READ_CPUS})
        select = {"column": column, "field": field, "name": name}
        return rows.map_batches(_select_columns, batch_format="pyarrow", fn_kwargs=select, num_cpus=READ_CPUS)

    def _columns(self) -> tuple[str, str | None, str]:
        """The column of bytes, its field where it is a structure as in Hugging Face's data sets, and that of names."""
        pq = import_extra("pyarrow.parquet", extra="ray", purpose="Parquet files")
        path = self.paths[0]
        try:
            if is_uri(path):
                base, inner = _file_system(path)
                schema = pq.read_schema(inner, filesystem=base)
            else:
                schema = pq.read_schema(path)
        except (OSError, ValueError) as error:
            raise BrixelError(f"{path} cannot be read as Parquet ({error})") from error
        column = _choose("bytes_column", self.bytes_column, _BYTES_COLUMNS, schema.names, path)
        kind = schema.field(column).type
        is_structure = str(kind).startswith("struct")
        if is_structure and {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}:
            return column, "bytes", self.name_column or column
        if "binary" not in str(kind):
            raise BrixelError(f"the column {column!r} of {path} holds {kind}; expected the bytes of image files")
        return column, None, _choose("name_column", self.name_column, _NAME_COLUMNS, schema.names, path)


def _choose(what: str, given: str | None, usual: Sequence[str], names: Sequence[str], path: str) -> str:
    if given is not None and given not in names:
        raise BrixelError(f"{what} is {given!r}, which {path} lacks; {did_you_mean(given, names)}")
    found = given or next((name for name in usual if name in names), None)
    if found is None:
        raise BrixelError(f"{path} has the columns {', '.join(names)}: name one as {what}=")
    return found


def _select_columns(table: Any, *, column: str, field: str | None, name: str) -> Any:
    """The columns of a Parquet file as `image` and `bytes`."""
    pa, pc = (import_extra(each, extra="ray", purpose="Parquet files") for each in ("pyarrow", "pyarrow.compute"))
    content = table[column]
    names = pc.struct_field(table[column], "path") if name == column else table[name]
    if field is not None:
        content = pc.struct_field(content, field)
    columns = {"image": names.cast(pa.string()), "bytes": content.cast(pa.large_binary())}
    return pa.table({**columns, "error": pa.nulls(len(table), pa.string())})


def _read_tars(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The images of tars, as `TAR/MEMBER`; a row with an error, of the tar's own name, where one cannot be read on."""
    for path in map(str, batch["path"]):
        rows: list[tuple[str, bytes, str | None]] = []
        name = PurePosixPath(path).name
        stem = next(name.removesuffix(suffix) for suffix in reversed(TAR_SUFFIXES) if name.endswith(suffix))
        try:
            for member, content in _members(path):
                rows.append((f"{stem}/{member}", content, None))
                if len(rows) == _ROWS_PER_READ:
                    yield _rows(rows)
                    rows = []
        except (OSError, EOFError, tarfile.TarError) as error:
            rows.append((name, b"", f"{path}: cannot be read to its end ({error})"))
        yield _rows(rows)


def _members(path: str) -> Iterator[tuple[str, bytes]]:
    with _open_file(path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            if member.isfile() and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read()


class _Member(tarfile.TarInfo):
    """A member of a tar that does not end silently where a header is damaged or missing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        """The next member."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # its end, as every whole tar has
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}: it is damaged or cut off") from error


def _open_file(path: str) -> Any:
    if not is_uri(path):
        return open(path, "rb")
    base, inner = _file_system(path)
    return base.open_input_stream(inner)


def _rows(rows: Sequence[tuple[str, bytes, str | None]]) -> dict[str, Any]:
    pa = import_extra("pyarrow", extra="ray", purpose="tars")
    names, contents, errors = ([row[column] for row in rows] for column in range(3))
    columns = {"image": pa.array(names, pa.string()), "bytes": pa.array(contents, pa.large_binary())}
    return pa.table({**columns, "error": pa.array(errors, pa.string())})


def _file_system(uri: str) -> tuple[Any, str]:
    """The file system of pyarrow that a URI names, and the path in it."""
    fs = import_extra("pyarrow.fs", extra="ray", purpose="object stores")
    try:
        return fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise BrixelError(f"{uri} names no file system that pyarrow reads ({error})") from error
