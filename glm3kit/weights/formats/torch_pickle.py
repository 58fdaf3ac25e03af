"""The pickle inside a PyTorch file, read as data: names, tensors and their places in storages; nothing is called.

`torch.save` writes a small subset of pickle's instructions (torch/_weights_only_unpickler.py lists it). This is an
interpreter of that subset over plain values: a global is a word here, never an import, and only those of `CONSTRUCTORS`
and `STORAGES` are understood. `pickletools.genops` of the standard library splits the instructions.

    read_state_dict(data)["transformer.output_layer.weight"].shape
"""

import pickletools
import reprlib
from collections.abc import Iterable
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from glm3kit.weights.tensors import TensorSpec

STORAGES = {f"torch {kind}Storage": dtype for kind, dtype in {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}.items()}
ORDERED_DICT = "collections OrderedDict"
REBUILD = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
CONSTRUCTORS = (ORDERED_DICT, REBUILD, PARAMETER)
MAX_INSTRUCTIONS = 1_000_000  # a state_dict of ChatGLM3-6B has 7,000
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
             "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# How many values an instruction takes off the stack; None: all since the mark.
TAKEN = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "SETITEMS": None, "APPEND": 1,
         "APPENDS": None, "BINPERSID": 1, "REDUCE": 2, "BUILD": 1}


class Refused(ValueError):
    """What the pickle holds beside tensors, or what is no pickle of PyTorch."""


class Global(NamedTuple):
    """A word for something of a module; it stays a word."""

    name: str  # "module attribute"


class Storage(NamedTuple):
    """Numbers of one type, one after the other, somewhere in the file."""

    key: str
    dtype: str
    size: int  # values

    @property
    def nbytes(self) -> int:
        return TensorSpec(self.dtype, (self.size,)).nbytes


class TensorRef(NamedTuple):
    """A tensor as the pickle tells it: a window of a storage; offset and strides count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.storage.dtype, self.shape)


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _storage(identity: object) -> Storage:
    """Read a persistent id: ("storage", type, key, device, number of values); the legacy form adds a view of None."""
    match identity:
        case ("storage", Global(name), str(key), str(), size, *view) if (
                name in STORAGES and _are_counts(size) and view in ([], [None])):
            return Storage(key, STORAGES[name], size)
    raise Refused(f"a reference {reprlib.repr(identity)}, expected a storage with type, key, device and size")


def _call(function: object, arguments: object) -> object:
    """What the few known constructors make of their arguments."""
    match function, arguments:
        case Global(name), tuple() if name == ORDERED_DICT and not arguments:
            return {}
        case Global(name), (TensorRef() as tensor, bool(), dict()) if name == PARAMETER:
            return tensor
        case Global(name), (Storage() as storage, offset, tuple(shape), tuple(strides), bool(), dict(), *more) if (
                name == REBUILD and more in ([], [{}], [None]) and len(shape) == len(strides)
                and _are_counts(offset, *shape, *strides)):
            return TensorRef(storage, offset, shape, strides)
    raise Refused(f"a call of {reprlib.repr(function)} with {reprlib.repr(arguments)}")


def _apply(code: str, taken: list, stack: list) -> None:
    """Carry out an instruction with the values that it has taken off the stack."""
    if code.startswith("TUPLE"):
        stack.append(tuple(taken))
    elif code == "BINPERSID":
        stack.append(_storage(*taken))
    elif code == "REDUCE":
        stack.append(_call(*taken))
    elif code.startswith("APPEND"):
        if type(stack[-1]) is not list:
            raise Refused("items for something that is no list")
        stack[-1].extend(taken)
    elif type(stack[-1]) is not dict:
        raise Refused("keys and values for something that is no dict")
    elif code != "BUILD":  # whose values are the versions that a state_dict carries as an attribute: not needed
        for key, value in zip(taken[::2], taken[1::2], strict=True):
            if type(key) is not str:
                raise Refused(f"the key {reprlib.repr(key)}, expected a name")
            stack[-1][key] = value


def _run(instructions: Iterable[tuple[str, Any]], frames: list[list], memo: dict[int, Any]) -> Any:
    """Run the instructions on a stack of frames; a mark opens a frame. Returns what stands at the end."""
    for code, argument in islice(instructions, MAX_INSTRUCTIONS):
        stack = frames[-1]
        if code in LITERALS:
            stack.append(argument)
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code]())
        elif code in TAKEN:
            count = TAKEN[code]
            taken = frames.pop() if count is None else [stack.pop() for _ in range(count)][::-1]
            _apply(code, taken, frames[-1])
        elif code == "GLOBAL":
            if argument not in STORAGES and argument not in CONSTRUCTORS:
                raise Refused(f"the global '{argument.replace(' ', '.')}', which is none of a tensor")
            stack.append(Global(argument))
        elif code == "MARK":
            frames.append([])
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code == "STOP":
            (result,) = stack
            return result
        elif code != "PROTO":
            raise Refused(f"the instruction {code}, which no file of tensors has")
    raise Refused(f"no end within {MAX_INSTRUCTIONS} instructions")


def _entry(frames: list[list]) -> object:
    """The key of the outermost dict whose value was being made; None where there is none."""
    # A dict of one entry needs no mark, the entries of others are since the first one.
    entries = frames[0][1:2] or [entry for frame in frames[1:2] for entry in frame]
    return entries[(len(entries) - 1) // 2 * 2] if entries else None


def read_value(data: bytes | BinaryIO) -> Any:
    """Read one pickle of plain values and tensors; of a stream it takes the bytes of that pickle only.

    Raises Refused for anything else, and names the entry of the outermost dict in which it stands.
    """
    frames: list[list] = [[]]
    try:
        return _run(((code.name, argument) for code, argument, _ in pickletools.genops(data)), frames, {})
    except Refused as err:
        at = _entry(frames)
        raise Refused(f"tensor '{at}': {err}" if type(at) is str else str(err)) from None
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as err:
        raise Refused(f"its pickle is damaged or cut off ({err})") from err


def read_state_dict(data: bytes | BinaryIO) -> dict[str, TensorRef]:
    """Read the pickle of a state_dict: names to tensors.

    Raises Refused, with the name, for anything that is no tensor.
    """
    value = read_value(data)
    if type(value) is not dict:
        raise Refused(f"a {type(value).__name__}, expected the tensors of a state_dict by name")
    for name, tensor in value.items():
        if type(tensor) is not TensorRef:
            raise Refused(f"'{name}': a {type(tensor).__name__}, expected a tensor; save model.state_dict() alone")
    return value
