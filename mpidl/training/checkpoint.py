"""A checkpoint: a folder of files under a manifest with the size and SHA-256 of each; it is whole or refused by name.

    checkpoints/000012/manifest.json        format, versions, settings, progress, files
                       model.safetensors    what `load_state_dict` takes, in logical order
                       training.pt ...      everything else: torch.load(..., weights_only=True)

It is written as `checkpoints/.000012.part`, every file synced, the manifest last; then the folder is renamed, and only
after that are older ones removed. So a crash at any moment leaves the newest checkpoint that was ever whole. Which
files there are is decided in `saving`; nothing communicates here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mpidl.errors import ArgumentError
from mpidl.training.outputs import sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"\d{6,}")


class DamagedError(ArgumentError):
    """A checkpoint is not whole; the message names the file."""


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is whole; each file is compared with it when it is read."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def number(self) -> int:
        return int(self.path.name)

    def has(self, name: str) -> bool:
        """Returns whether the manifest lists a file of that name."""
        return name in self.manifest["files"]

    def read(self, name: str) -> bytes:
        """Returns a file's content.

        Raises:
            DamagedError: it is missing or not what was written.
        """
        expected = self.manifest["files"][name]
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedError(f"{self.path / name} cannot be read ({error.strerror})") from error
        if len(content) != expected["nbytes"]:
            raise DamagedError(f"{self.path / name} has {len(content)} bytes, was written with {expected['nbytes']}")
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise DamagedError(f"{self.path / name} is damaged: its SHA-256 is not the one that was written")
        return content

    def check(self) -> None:
        """Reads every file.

        Raises:
            DamagedError: one is missing or not what was written.
        """
        for name in self.manifest["files"]:
            self.read(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint in the folder `path`, its manifest checked.

    Raises:
        DamagedError: the manifest is missing or not what was written.
        ArgumentError: it has a format that this version does not know.
    """
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
        manifest = json.loads(raw)
    except OSError as error:
        raise DamagedError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamagedError(f"{file} is damaged: it is not JSON") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) is None or raw != _sealed(manifest):
        raise DamagedError(f"{file} is damaged: its SHA-256 is not the one that was written")
    if manifest["format"] != FORMAT:
        by = manifest.get("versions", {}).get("mpidl", "another version")
        raise ArgumentError(
            f"{path} has format {manifest['format']}, written by mpidl {by}; this version reads format {FORMAT}"
        )
    return Checkpoint(path, manifest)


class Draft:
    """A checkpoint that is being written, by one rank or by several into the same folder.

    One rank calls `create` first and `commit` last; each adds its own files in between.
    """

    def __init__(self, store: Path, number: int) -> None:
        self._target = store / f"{number:06d}"
        self._folder = store / f".{number:06d}.part"

    def create(self) -> None:
        """Makes the folder, empty."""
        self.drop()
        self._folder.mkdir(parents=True)

    def add(self, name: str, content: bytes) -> Entry:
        """Writes one file and returns what the manifest must say of it."""
        self._write(name, content)
        return Entry(len(content), hashlib.sha256(content).hexdigest())

    def commit(self, content: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
        """Writes the manifest and gives the folder its name.

        Raises:
            OSError: it could not be written, or a file of another rank is not to be seen from here.
        """
        for name in entries:
            if not (self._folder / name).is_file():
                raise OSError(f"{name} of another rank is not there: --output must be a folder that all nodes share")
        files = {name: asdict(entry) for name, entry in entries.items()}
        manifest = {"format": FORMAT, **content, "files": files}
        self._write(MANIFEST, _sealed(manifest))
        sync_folder(self._folder)
        self._folder.rename(self._target)  # content and names are on disk before the folder gets its own
        sync_folder(self._target.parent)

    def _write(self, name: str, content: bytes) -> None:
        with (self._folder / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def drop(self) -> None:
        """Removes what was written of it."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Store:
    """The checkpoints of one folder, numbered upwards as they were written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def numbers(self) -> list[int]:
        """Returns the numbers of the checkpoints, whole or not, oldest first."""
        return sorted(int(entry.name) for entry in self._entries() if _NAME.fullmatch(entry.name))

    def next_number(self) -> int:
        """Returns a number above all that were ever given, set aside and unfinished ones included."""
        named = [re.match(r"\.?(\d{6,})", entry.name) for entry in self._entries()]
        return 1 + max((int(match[1]) for match in named if match), default=0)

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """Returns the newest checkpoint that is whole; None if there is none at all.

        Args:
            say: is told of each one that is not.

        Raises:
            ArgumentError: there are checkpoints, but none is whole, or the newest whole one has an unknown format.
        """
        complaints = []
        for number in reversed(self.numbers()):
            try:
                found = open_checkpoint(self.path / f"{number:06d}")
                found.check()
                return found
            except DamagedError as error:
                complaints.append(str(error))
                say(f"refused: {error}; trying the checkpoint before")
        if complaints:
            raise ArgumentError(f"no checkpoint in {self.path} is whole: {'; '.join(complaints)}")
        return None

    def set_aside(self, above: int, say: Callable[[str], None]) -> None:
        """Renames checkpoints with numbers above that one, which are not to be used, so that none is counted again.

        What was never finished is removed.
        """
        for number in self.numbers():
            if number > above:
                (self.path / f"{number:06d}").rename(self.path / f"{number:06d}.aside")
        for entry in self._entries():
            if re.fullmatch(r"\.\d{6,}\.(part|old)", entry.name):
                if entry.suffix == ".part":
                    say(f"{entry} was never finished and is removed")
                shutil.rmtree(entry, ignore_errors=True)

    def keep(self, count: int) -> None:
        """Removes all but the newest `count`; each is hidden by a rename first, so that none is ever seen in part."""
        for number in self.numbers()[:-count]:
            hidden = self.path / f".{number:06d}.old"
            with contextlib.suppress(OSError):  # it stays: too many checkpoints are no reason to stop
                (self.path / f"{number:06d}").rename(hidden)
                shutil.rmtree(hidden)

    def _entries(self) -> Iterator[Path]:
        return iter(list(self.path.iterdir()) if self.path.is_dir() else [])


# Contents of files.


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Returns a safetensors file; of tensors that share memory (tied weights) each is written out."""
    seen, separate = set[int](), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous()
        storage = dense.untyped_storage().data_ptr()
        separate[name] = dense.clone() if storage in seen else dense
        seen.add(storage)
    return safetensors.torch.save(separate, metadata={"format": "pt"})


def decode_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file."""
    return safetensors.torch.load(content)


def encode(content: Mapping[str, Any]) -> bytes:
    """Returns a torch file of tensors, numbers, strings and containers of them."""
    stream = io.BytesIO()
    torch.save(dict(content), stream)
    return stream.getvalue()


def decode(content: bytes) -> dict[str, Any]:
    """Returns what `encode` was given; runs no code from the file."""
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return loaded


def check_encodable(what: str, content: Mapping[str, Any]) -> None:
    """Refuses what could be saved but not loaded again.

    Raises:
        ArgumentError: `content` holds something else than tensors, numbers, strings and containers of them.
    """
    try:
        decode(encode(content))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(f"{what} cannot be saved in a checkpoint: {type(error).__name__}: {reason}") from error


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as a file, with its own SHA-256 in it. A file is whole if it is this, byte for byte.

    The sum alone would miss a changed last digit: two texts of a number can mean the same one.
    """
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=2) + "\n").encode()
