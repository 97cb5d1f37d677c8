"""Pickles are read as data: every protocol gives the values, and whatever would call something is refused unrun."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaclass.errors import DataError
from megaclass.prepare.pickled import PickledArray, read_values

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "lfw.bin"
    path.write_bytes(content)
    return path


def plain(value: Any) -> Any:
    if isinstance(value, PickledArray):
        return value.content
    return type(value)(plain(inner) for inner in value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(
    value=st.recursive(
        st.one_of(
            st.integers(), st.booleans(), st.none(), st.binary(max_size=300), st.text(max_size=300),
            st.floats(allow_nan=False),
        ),
        lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple)),
    )
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_data_comes_back_as_it_was(protocol: int, value: Any, tmp_path: Path) -> None:
    assert read_values(written(tmp_path, pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_stands_twice_is_kept_once(protocol: int, tmp_path: Path) -> None:
    image, several = bytes(range(256)) * 3, [1, 2]
    found = read_values(written(tmp_path, pickle.dumps([image, several, image, several], protocol)))
    assert found == [image, several, image, several]
    assert found[1] is found[3]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_numbers_of_numpy_are_their_bytes(protocol: int, tmp_path: Path) -> None:
    image = np.arange(256, dtype=np.uint8)
    column = image[:, None].copy()
    frozen = image.copy()
    frozen.setflags(write=False)
    value = ([image, column, frozen, b""], [np.bool_(True), np.True_, np.int8(-1), np.array([True, False])])
    images, answers = plain(read_values(written(tmp_path, pickle.dumps(value, protocol))))
    assert images == [image.tobytes()] * 3 + [b""]
    assert answers == [True, True, -1, b"\1\0"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_older_numpy_named_its_modules_otherwise(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps([np.arange(9, dtype=np.uint8), np.bool_(True)], protocol)
    lengths = {b"numpy._core.multiarray": b"numpy.core.multiarray", b"numpy._core.numeric": b"numpy.core.numeric"}
    for new, old in lengths.items():
        content = content.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
    assert b"_core" not in content
    assert plain(read_values(written(tmp_path, content))) == [bytes(range(9)), True]


def text_of_python_2(data: bytes, protocol: int) -> bytes:
    """`str` as Python 2's pickle wrote it."""
    if protocol == 0:
        return b"S" + repr(data).removeprefix("b").encode("ascii") + b"\n"
    if len(data) < 256:
        return b"U" + bytes([len(data)]) + data
    return b"T" + struct.pack("<i", len(data)) + data


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_text_of_python_2_is_bytes(protocol: int, tmp_path: Path) -> None:
    images = [bytes(range(256)), b"", b'it\'s "quoted"\n\\', b"\xff\xd8short"]
    body = b"".join(text_of_python_2(image, protocol) + b"a" for image in images)
    answers = b"(lp2\nI01\naI00\na" if protocol < 2 else b"]q\x02(\x88\x89e"
    content = (b"\x80\x02" if protocol == 2 else b"") + b"((lp1\n" + body + answers + b"t."
    path = written(tmp_path, content)
    assert read_values(path) == (images, [True, False])
    if protocol:
        assert pickle.loads(content, encoding="bytes") == (images, [True, False])


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


class Plain:
    """An object with a state."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_runs(protocol: int, tmp_path: Path) -> None:
    bird = tmp_path / "canary"
    for call in (
        Canary(os.system, f"touch {bird}"),
        Canary(eval, f"open({str(bird)!r}, 'w').close()"),
        Canary(os.mkdir, bird),
    ):
        content = pickle.dumps(([b"image", call], [True]), protocol)
        with pytest.raises(DataError, match=r"lfw\.bin: opcode (STACK_)?GLOBAL at byte \d+ is refused: it names '"):
            read_values(written(tmp_path, content))
        assert not bird.exists()
        pickle.loads(content)  # the canary sings
        assert bird.exists()
        bird.unlink() if bird.is_file() else bird.rmdir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'touch x'\ntR.", r"opcode GLOBAL at byte 0 is refused: it names 'os.system'; only numbers"),
        (b"(S'touch x'\nios\nsystem\n.", r"opcode INST at byte 12 is refused: it makes more than data"),
        (b"(cos\nsystem\nS'touch x'\no.", r"opcode GLOBAL at byte 1 is refused: it names 'os.system'"),
        (b"\x80\x02\x82\x01.", r"opcode EXT1 at byte 2 is refused: it makes more than data"),
        (b"Pid\n.", r"opcode PERSID at byte 0 is refused"),
        (b"I1\nQ.", r"opcode BINPERSID at byte 3 is refused"),
        (b"\x80\x02}.", r"opcode EMPTY_DICT at byte 2 is refused"),
        (b"I1\n2.", r"opcode DUP at byte 3 is refused"),
        (b"cnumpy\ndtype\n)\x81.", r"opcode NEWOBJ at byte 14 is refused: it makes more than data"),
        (b"cnumpy\nfromfile\n.", r"it names 'numpy.fromfile'"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", r"opcode REDUCE at byte 28 is refused: it is a call of another form"),
        ("c_codecs\nencode\n(V\u0394\nVlatin1\ntR.".encode("raw-unicode-escape"), r"is refused: its text is no bytes"),
        (b"c__builtin__\nbytes\n(I1000000000000\ntR.", r"opcode REDUCE at byte \d+ is refused: it is a call"),
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", r"arrays have elements of type 'O8'; read are b1, i1, u1"),
        (b"I1\n)R.", r"opcode REDUCE at byte 4 is refused: it calls something that was not named"),
        (b"(lI1\nb.", r"opcode BUILD at byte 5 is refused: it sets the state of an object"),
        (b"I1\nI2\na.", r"opcode APPEND at byte 6 is refused: its operand is no list"),
        (b"g7\n.", r"opcode GET at byte 0 is refused: nothing was kept under 7"),
        (b"t.", r"opcode TUPLE at byte 0 is refused: there is no mark before it"),
        (b"(\x85.", r"opcode TUPLE1 at byte 1 is refused: its operand is missing"),
        (b"I1\nI2\n.", r"opcode STOP at byte 6 is refused: values are left over"),
        (b".", r"opcode STOP at byte 0 is refused: its operand is missing"),
        (b"\x80\x09.", r"opcode PROTO at byte 0 is refused: protocol 9 is newer than 5"),
        (b"\xff\xd8\xff\xe0", r"the end of the file at byte 0 is refused: b'\\xff' is no opcode"),
        (b"(l", r"the end of the file at byte 2 is refused: the file ends before its pickle does"),
        (b"", r"the end of the file at byte 0 is refused: the file ends before its pickle does"),
        (b"T\xff\xff\xff\x7fabc", r"opcode BINSTRING at byte 0 cannot be read: expected 2147483647 bytes.*cut off"),
        (b"\x8e" + b"\xff" * 8 + b"abc", r"opcode BINBYTES8 at byte 0 cannot be read"),
        (b"T\xff\xff\xff\xffabc", r"opcode BINSTRING at byte 0 cannot be read"),
        (b"Inumber\n.", r"opcode INT at byte 0 cannot be read: invalid literal"),
        (b"Sno quotes\n.", r"opcode STRING at byte 0 cannot be read: its text has no quotes around it"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_opcode_and_place(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read_values(written(tmp_path, content))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_arrays_and_objects_are_refused(protocol: int, tmp_path: Path) -> None:
    square = np.zeros((9, 9), dtype=np.uint8)
    for value, message in (
        (square, r"an array of shape \(9, 9\) holds 81 bytes; read are rows of bytes"),
        (np.arange(3.0), "arrays have elements of type 'f8'"),
        (np.array([Plain()], dtype=object), "is refused: "),
        (Plain(), "is refused: "),
        ({1: 2}, "is refused: it makes more than data"),
        ({1}, "is refused: "),
        (2j, "it names '.*complex'"),
    ):
        with pytest.raises(DataError, match=message):
            read_values(written(tmp_path, pickle.dumps(([value], [True]), protocol)))


@given(content=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_bytes_end_in_values_or_a_reason(content: bytes, tmp_path: Path) -> None:
    with contextlib.suppress(DataError):
        read_values(written(tmp_path, content))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_spoiled_pickles_end_in_values_or_a_reason(data: st.DataObject, tmp_path: Path) -> None:
    protocol = data.draw(st.sampled_from(PROTOCOLS))
    value = ([bytes(range(200)), np.arange(9, dtype=np.uint8), b""], [True, np.bool_(False), 1])
    content = bytearray(pickle.dumps(value, protocol))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        read_values(written(tmp_path, bytes(content)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.bin cannot be read: No such file or directory; give a pickled file"):
        read_values(tmp_path / "nowhere.bin")


def test_every_opcode_that_is_not_read_is_known_to_be_left_out() -> None:
    """A new one of a later Python is refused like any other; this list says which of today's are."""
    from megaclass.prepare import pickled

    read = {*pickled._CONSTANTS, *pickled._LITERALS, *pickled._OPCODES}
    assert {opcode.name for opcode in pickletools.opcodes} - read == {
        "ADDITEMS", "BINPERSID", "DICT", "DUP", "EMPTY_DICT", "EMPTY_SET", "EXT1", "EXT2", "EXT4", "FROZENSET",
        "INST", "NEWOBJ", "NEWOBJ_EX", "NEXT_BUFFER", "OBJ", "PERSID", "POP", "POP_MARK", "READONLY_BUFFER", "SETITEM",
        "SETITEMS",
    }  # fmt: skip
