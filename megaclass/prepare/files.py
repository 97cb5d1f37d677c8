"""The image files under a folder or in a zip, as untrusted input.

Separate from `images` and `strips`, which give the files their meaning. Nothing is ever unpacked to disk: zip entries
are read in memory, up to `MAX_FILE_BYTES` each. Names are POSIX paths relative to the root, in sorted order, and always
text that can be written as UTF-8. Hidden files, `__MACOSX` folders and files that are not images by extension are left
out and counted.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from types import TracebackType

from megaclass.errors import DataError
from megaclass.prepare.digest import parts_sha256, state_of
from megaclass.prepare.encode import MAX_FILE_BYTES, UnreadableImage

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm")


class ImageFiles:
    """The image files of one root; a context that closes the zip.

    Attributes:
        root: the folder or zip.
        names: POSIX paths relative to the root, sorted.
        num_ignored: files that are not images by their extension, or hidden.
        empty_folders: folders that hold neither an image nor another folder, sorted.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        num_ignored: int,
        empty_folders: list[str],
        reader: FolderReader | ZipReader,
    ) -> None:
        self.root = root
        self.names = names
        self.num_ignored = num_ignored
        self.empty_folders = empty_folders
        self.reader = reader

    def __enter__(self) -> ImageFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.close()

    def read(self, number: int) -> bytes:
        """The bytes of one file.

        Raises:
            UnreadableImage: it cannot be read, or is larger than `MAX_FILE_BYTES`.
        """
        return self.reader(self.names[number])

    def state(self) -> str:
        """A digest that is another one if a file was added, removed or changed, as far as sizes and times tell."""
        if isinstance(self.reader, ZipReader):
            return parts_sha256([state_of(self.root)])
        return parts_sha256(f"{name}\0{state_of(self.root / name)}" for name in self.names)


class FolderReader:
    """Reads files below a folder by name; may be sent to other processes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> bytes:
        """The bytes of one file; raises `UnreadableImage`."""
        return _read_file(self._root / name)

    def close(self) -> None:
        """Nothing is open."""


class ZipReader:
    """Reads entries of a zip by name; may be sent to other processes, each of which opens the zip for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        self._entries: dict[str, zipfile.ZipInfo] = {}

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self._path,)

    def __call__(self, name: str) -> bytes:
        """The bytes of one entry; raises `UnreadableImage`, and `DataError` if the zip cannot be opened any more."""
        archive = self._archive or self.open()
        if name not in self._entries:
            raise UnreadableImage("no longer in the zip")
        return _read_entry(archive, self._entries[name])

    def open(self) -> zipfile.ZipFile:
        """The zip, opened."""
        try:
            self._archive = zipfile.ZipFile(self._path)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"{self._path} is neither a folder nor a readable zip: {error}") from None
        for entry in self._archive.infolist():
            self._entries[_zip_name(self._path, entry)] = entry
        return self._archive

    def close(self) -> None:
        """Close the zip; the next read opens it again."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None


def open_root(root: Path) -> ImageFiles:
    """The image files of a folder or a zip.

    Raises:
        DataError: the root is missing or neither, holds no image, or holds a name or link that cannot be used.
    """
    return _open_folder(Path(root)) if Path(root).is_dir() else open_zip(root)


def open_zip(path: Path) -> ImageFiles:
    """The image files of a zip.

    Raises:
        DataError: no such file or not a zip, no image in it, encrypted or doubled entries, links, absolute names or
            names with "..", or names that are not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder or a .zip with the images")
    reader = ZipReader(path)
    try:
        entries: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        num_ignored = 0
        for entry in reader.open().infolist():
            name = _zip_name(path, entry)
            if entry.is_dir():
                folders.add(name.rstrip("/"))
            elif not _is_image(name):
                num_ignored += 1
            elif name in entries:
                raise DataError(f"{path} holds {name!r} twice; remove one")
            else:
                _check_entry(path, name, entry)
                entries[name] = entry
        return _checked(
            ImageFiles(
                path,
                sorted(entries),
                num_ignored,
                _empty(folders, entries),
                reader,
            )
        )
    except BaseException:
        reader.close()
        raise


def _zip_name(path: Path, entry: zipfile.ZipInfo) -> str:
    name = entry.filename
    # Without the UTF-8 flag zipfile reads the bytes as code page 437, yet many programs put UTF-8 there.
    if not entry.flag_bits & 0x800 and not name.isascii():
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            raise DataError(f"{path} holds the name {name!r}, which is not UTF-8; rename it and zip again") from None
    return name


def _check_entry(path: Path, name: str, entry: zipfile.ZipInfo) -> None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or "\\" in name or ".." in parts or not parts or ":" in parts[0]:
        raise DataError(
            f"{path} holds the name {name!r}; allowed are relative paths without '..'; zip the folder again"
        )
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise DataError(f"{path} holds the link {name!r}; zip the files themselves")
    if entry.flag_bits & 0x1:
        raise DataError(f"{path} holds the encrypted file {name!r}; zip it without a password")


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    # The declared size is checked first and the actual one while reading: either may lie.
    if entry.file_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{entry.file_size:,} bytes; allowed are {MAX_FILE_BYTES:,}")
    try:
        with archive.open(entry) as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UnreadableImage(f"damaged in the zip: {error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableImage(f"more than {MAX_FILE_BYTES:,} bytes")
    return data


def _open_folder(root: Path) -> ImageFiles:
    real_root = root.resolve()
    names: list[str] = []
    folders: set[str] = set()
    num_ignored = 0

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read: {error.strerror}; allow reading or remove it")

    for folder, subfolders, file_names in os.walk(real_root, onerror=refuse):
        relative = Path(folder).relative_to(real_root)
        subfolders[:] = [entry for entry in subfolders if not _is_hidden(entry)]
        for entry in subfolders:
            path = Path(folder) / entry
            if path.is_symlink():
                raise DataError(f"folder {path} is a link; put the folder itself in its place")
            folders.add(_text(root, relative / entry))
        for entry in file_names:
            path = Path(folder) / entry
            if not _is_image(entry):
                num_ignored += 1
                continue
            name = _text(root, relative / entry)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real_root):
                raise DataError(f"file {path} is a link that leads out of {root}; put the file itself in its place")
            names.append(name)
    names.sort()
    return _checked(ImageFiles(root, names, num_ignored, _empty(folders, names), FolderReader(real_root)))


def _read_file(path: Path) -> bytes:
    try:
        # A pipe or device would block or never end.
        if not path.is_file():
            raise UnreadableImage("not a regular file")
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableImage(str(error.strerror)) from None
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableImage(f"more than {MAX_FILE_BYTES:,} bytes")
    return data


def _text(root: Path, path: Path) -> str:
    name = path.as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{root} holds the name {name!r}, which is not UTF-8; rename it") from None
    return name


def _is_hidden(part: str) -> bool:
    return (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX"


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not any(_is_hidden(part) for part in path.parts)


def _empty(folders: set[str], names: object) -> list[str]:
    assert isinstance(names, (list, dict))
    full = {parent.as_posix() for name in (*names, *folders) for parent in PurePosixPath(name).parents}
    return sorted(folder for folder in folders if folder not in full and not _is_hidden(PurePosixPath(folder).name))


def _checked(files: ImageFiles) -> ImageFiles:
    if not files.names:
        raise DataError(
            f"{files.root} holds no image ({', '.join(EXTENSIONS)}; {files.num_ignored} other files); "
            "give a folder or .zip with one folder per class"
        )
    return files
