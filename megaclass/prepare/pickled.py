"""Reading the values of a pickle without unpickling: an interpreter of its own that can make data and nothing else.

A pickle is a program for a stack machine, and its opcodes REDUCE, BUILD, INST and so on call whatever they name. Here
only those opcodes are understood that put together numbers, text, bytes, lists and tuples; any other ends the reading.
Nothing is imported and nothing called. Three forms would be calls and stand in files that are handed round; they are
recognised by name and read as the data they stand for:

- bytes, which Python 3 writes as `_codecs.encode(text, "latin1")` or `bytes()` up to protocol 2;
- arrays of numpy of one-byte elements (what OpenCV's encoder gives), read as their bytes;
- single booleans and small integers of numpy, read as numbers.

The text of Python 2 (its `str`) is bytes here. Separate from `verification_bin`, which knows what the values mean.

Source: the comments of `pickletools` in the Python standard library, from which the opcodes' arguments are read. That
module decodes and runs nothing.
"""

from __future__ import annotations

import codecs
import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megaclass.errors import DataError

_NEWEST_PROTOCOL = 5
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
# What a global that may be named stands for; of other globals the name alone is an error.
_FORMS = {
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    "builtins bytes": "bytes",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"{module} _reconstruct": "_reconstruct" for module in _MODULES[:2]},
    **{f"{module} scalar": "scalar" for module in _MODULES[:2]},
    **{f"{module} _frombuffer": "_frombuffer" for module in _MODULES[2:]},
}
_BY_CODE = {opcode.code: opcode for opcode in pickletools.opcodes}
_ONE_BYTE = {"u1", "i1", "b1"}


class _Refused(ValueError):
    """Why the opcode at hand is refused, without its place."""


class _Mark:
    """The opcode MARK on the stack."""


class _Named:
    """A global that was named, by what it stands for in `_FORMS`; never the object itself."""

    def __init__(self, form: str) -> None:
        self.form = form


class _Dtype:
    """An element type of numpy, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name


class PickledArray:
    """An array of numpy with one row of one-byte elements; `content` is None until the opcode BUILD brings it."""

    content: bytes | None = None


def read_values(path: Path) -> Any:
    """What the pickle in `path` holds: numbers, None, text, bytes, arrays, and lists and tuples of these.

    Raises:
        DataError: it cannot be read, is cut off, or is more than data; the message names the opcode and its place.

    Cost: the file in memory, and once more the bytes in it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a pickled file of pairs, as lfw.bin") from None
    machine = _Machine()
    stream = io.BytesIO(content)
    while not machine.has_stopped:
        place = stream.tell()
        code = stream.read(1)
        name = "the end of the file"
        try:
            if not code:
                raise _Refused("the file ends before its pickle does")
            opcode = _BY_CODE.get(code.decode("latin-1"))
            if opcode is None:
                raise _Refused(f"{code!r} is no opcode")
            name = f"opcode {opcode.name}"
            machine.step(opcode.name, _argument(opcode, stream))
        except _Refused as error:
            raise DataError(
                f"{path}: {name} at byte {place:,} is refused: {error}; only numbers, bytes and lists are read, and "
                "nothing in the file was run: get the file from its source again"
            ) from None
        # The readers of arguments raise ValueError for whatever does not fit: cut off, negative, no number, no UTF-8.
        except ValueError as error:
            raise DataError(
                f"{path}: {name} at byte {place:,} cannot be read: {error}; the file is cut off, damaged or no pickle"
            ) from None
    return machine.result


def _argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if opcode.name == "STRING":
        # The library's reader takes ASCII alone; Python 2 wrote images this way.
        line = stream.readline()
        if len(line) < 3 or line[:1] not in (b"'", b'"') or line[-2:-1] != line[:1] or line[-1:] != b"\n":
            raise ValueError("its text has no quotes around it")
        return codecs.escape_decode(line[1:-2])[0]
    return None if opcode.arg is None else opcode.arg.reader(stream)


class _Machine:
    """The stack, the memo, and one method per kind of opcode."""

    def __init__(self) -> None:
        self.has_stopped = False
        self.result: Any = None
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self._stack.append(_LITERALS[name](argument))
        elif name in _OPCODES:
            _OPCODES[name](self, argument)
        else:
            raise _Refused("it makes more than data")

    def _protocol(self, argument: int) -> None:
        if argument > _NEWEST_PROTOCOL:
            raise _Refused(f"protocol {argument} is newer than {_NEWEST_PROTOCOL}")

    def _frame(self, argument: int) -> None:
        """A frame says how far to read ahead, which changes no value."""

    def _pop(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise _Refused("its operand is missing")
        return self._stack.pop()

    def _marked(self) -> list[Any]:
        """Everything above the last mark, which is taken off with it."""
        for place in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[place], _Mark):
                found = self._stack[place + 1 :]
                del self._stack[place:]
                return found
        raise _Refused("there is no mark before it")

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _put(self, argument: int) -> None:
        self._memo[argument] = self._top()

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, argument: int) -> None:
        if argument not in self._memo:
            raise _Refused(f"nothing was kept under {argument}")
        self._stack.append(self._memo[argument])

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise _Refused("its operand is no list")
        target += values

    def _append(self, _: None) -> None:
        self._extend([self._pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._marked())

    def _list(self, _: None) -> None:
        self._stack.append(self._marked())

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._marked()))

    def _short_tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(values)))

    def _global(self, argument: str) -> None:
        if argument not in _FORMS:
            raise _Refused(f"it names {argument.replace(' ', '.', 1)!r:.200}")
        self._stack.append(_Named(_FORMS[argument]))

    def _stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Refused("its operands are no names")
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        values, called = self._pop(), self._pop()
        if not isinstance(called, _Named) or type(values) is not tuple:
            raise _Refused("it calls something that was not named")
        self._stack.append(_called(called.form, values))

    def _build(self, _: None) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, PickledArray):
            target.content = _array_content(state)
        # A type of one byte has no byte order, and its state says nothing else.
        elif not isinstance(target, _Dtype):
            raise _Refused("it sets the state of an object")

    def _stop(self, _: None) -> None:
        self.result = self._pop()
        if self._stack:
            raise _Refused("values are left over")
        self.has_stopped = True


def _called(form: str, values: tuple[Any, ...]) -> Any:
    """What a call of one of `_FORMS` stands for."""
    match form, values:
        case "encode", (str(text), "latin1" | "latin-1" | b"latin1"):
            return _latin1(text)
        case "bytes", ():
            return b""
        case "dtype", (str() | bytes() as name, _, _):
            return _dtype(name)
        case "_reconstruct", (_Named(form="ndarray"), (0,), b"b" | "b"):
            return PickledArray()
        case "scalar", (_Dtype() as dtype, bytes(content)):
            return _numbers(dtype, content, 1)[0]
        case "_frombuffer", (bytes(content), _Dtype(), tuple(shape), "C" | "F"):
            array = PickledArray()
            array.content = _sized(shape, content)
            return array
    raise _Refused("it is a call of another form than those that stand for data")


def _latin1(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise _Refused("its text is no bytes") from None


def _dtype(name: str | bytes) -> _Dtype:
    found = name.decode("latin-1") if isinstance(name, bytes) else name
    if found not in _ONE_BYTE:
        raise _Refused(f"arrays have elements of type {found!r:.20}; read are {', '.join(sorted(_ONE_BYTE))}")
    return _Dtype(found)


def _numbers(dtype: _Dtype, content: bytes, count: int) -> list[Any]:
    if len(content) != count:
        raise _Refused(f"{len(content)} bytes for {count} numbers")
    values: list[Any] = np.frombuffer(content, dtype.name).tolist()
    return values


def _array_content(state: Any) -> bytes:
    match state:
        case (1, tuple(shape), _Dtype(), _, bytes(content)):
            return _sized(shape, content)
    raise _Refused("the state of an array has another form")


def _sized(shape: tuple[Any, ...], content: bytes) -> bytes:
    """The bytes of an array with at most one side longer than 1: an image file, or a list of booleans."""
    if not all(type(side) is int for side in shape) or sorted(shape) != [1] * (len(shape) - 1) + [len(content)]:
        raise _Refused(f"an array of shape {shape!r:.40} holds {len(content)} bytes; read are rows of bytes")
    return content


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_LITERALS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), lambda x: x
    ),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), lambda x: x),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda text: text.encode("latin-1")),
    **dict.fromkeys(("STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), bytes),
}
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._protocol,
    "FRAME": _Machine._frame,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    "MEMOIZE": _Machine._memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "LIST": _Machine._list,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._short_tuple(1),
    "TUPLE2": lambda machine, _: machine._short_tuple(2),
    "TUPLE3": lambda machine, _: machine._short_tuple(3),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "STOP": _Machine._stop,
}
