"""Types of configuration keys, and `build`, which turns plain values into a checked dataclass.

A configuration class is a standard frozen dataclass whose annotations give the type and range of each key. pydantic
checks them in `build`. Creating an instance directly in Python checks nothing, as with any dataclass.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
import unicodedata
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from osp.errors import NotTextError, UserError

C = TypeVar("C")
FORMER = {"a_static": "static_activations"}  # name of a key in an earlier version -> its name
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def _to_int(value: Any) -> Any:
    """Convert an integral float: YAML reads 5e9 as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("must be text that is not empty")
    return text


def _name(text: str) -> str:
    if text in (".", "..") or len(text) > 200 or set(text) & set("/\\"):
        raise ValueError("must be a name of at most 200 characters without slashes")
    return text


def _path(text: str) -> str:
    text = os.path.expanduser(text)
    if text.startswith("~"):
        raise ValueError("must be a path; no user has this name, and a folder is written ./~NAME")
    if len(text) >= 4096 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("must be a path whose parts are at most 255 bytes long")
    return text


def _in_range(value: float) -> float:
    if abs(value) > 1e18:  # a product of two is a float32
        raise ValueError("must be at most 1e18 in size")
    return value


def _shown(value: Any) -> str:
    """Return `value` as messages show it; a long one is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


# Upper bounds refuse here what would otherwise fail in an allocation or after an hour.
Int = Annotated[int, BeforeValidator(_to_int)]
Count = Annotated[Int, Field(ge=1, le=10**15)]
CountOrZero = Annotated[Int, Field(ge=0, le=10**15)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
Threads = Annotated[Int, Field(ge=1, le=4096)]
# a `Literal` of ints would accept True for 1 and 2.0 for 2
ZeroStage = Annotated[Literal[1, 2, 3], BeforeValidator(lambda value: value if type(value) is int else None)]
Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_in_range)]
NotNegative = Annotated[Finite, Field(ge=0)]
Positive = Annotated[Finite, Field(gt=0)]
Decay = Annotated[Finite, Field(ge=0, lt=1)]  # of a running mean
PositiveFraction = Annotated[Finite, Field(gt=0, le=1)]
Share = Annotated[Finite, Field(gt=0, lt=1)]
Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[Text, AfterValidator(_name)]
FilePath = Annotated[Text, AfterValidator(_path)]
Device = Literal["auto", "cpu", "cuda"]


def build(cls: type[C], values: Any, *, path: str = "") -> C:
    """Return an instance of the dataclass `cls` with the given values, a table as YAML or JSON has it.

    Raises `UserError` with one line for the first unknown or missing key, wrong type, or value out of range. pydantic's
    strict mode for JSON turns lists into tuples, tables into dataclasses, and int into float where a float is wanted.
    It converts nothing else. path: dotted key of the table, for error messages.
    """
    _check_plain(values, path)
    try:
        return _adapter(cls).validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        errors = error.errors(include_url=False)
    message, (key, value, _) = _explain(cls, values, path, errors), _locate(cls, values, path, errors[0])
    kinds = {other["type"] for other in errors if _locate(cls, values, path, other)[0] == key}
    is_for_text = kinds == {"string_type"} or (kinds == {"string_type", "bool_type"} and value is not None)
    if is_for_text and message.startswith(f"{key}="):
        raise NotTextError(f"{message}; write it in quotes", re.sub(r"\[\d+\]$", "", key))
    raise UserError(message)


def _check_plain(value: Any, path: str) -> None:
    """Raise `UserError` for what JSON cannot hold, and for text that would break a line, a path or a log."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(f"{path or 'config'}: the key {key!r} is not text")
            _check_plain(key, path)
            _check_plain(inner, join(path, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{path}[{i}]")
    elif isinstance(value, str):
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            raise UserError(f"{path}={_shown(value)}: control characters and halves of characters are not allowed")
    elif isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write thousands of digits
        raise UserError(f"{path}: an integer of {value.bit_length()} bits is out of range")
    elif value is not None and not isinstance(value, int | float):
        raise UserError(f"{path}={_shown(value)}: must be text, a number, true, false, null, a list or a table")


def _explain(cls: type, values: Any, path: str, errors: list[ErrorDetails]) -> str:
    """Return the sentence for the first error: key, value, and what is right."""
    # a misspelt key explains a missing one
    error = next((error for error in errors if error["type"] == "unexpected_keyword_argument"), errors[0])
    key, value, table = _locate(cls, values, path, error)
    last = error["loc"][-1] if error["loc"] else None
    names = sorted(field.name for field in dataclasses.fields(table))
    if error["type"] == "unexpected_keyword_argument":
        return unknown(key.rpartition(".")[0], str(last), names)
    if error["type"] == "missing" and isinstance(last, str):
        return f"{join(key, last)} is missing"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # of a __post_init__, a whole sentence
        return str(cause)
    # a union has one error per type
    words = [_words(other) for other in errors if _locate(cls, values, path, other)[0] == key]
    choices = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
    close = difflib.get_close_matches(str(value if last != "[key]" else key.rpartition(".")[2]), choices, n=1)
    fix = f"; did you mean {close[0]!r}?" if close else ""
    if last == "[key]":
        return f"unknown key {key!r}; it {words[0]}{fix}"
    if error["type"] == "tuple_type" and isinstance(value, str):
        fix = f"; write {key}=[{value}]"
    if error["type"] == "dataclass_type":
        fix = f" with keys {', '.join(names)}"
    return f"{key or 'config'}={_shown(value)}: {' or '.join(words).replace(' or must be', ' or')}{fix}"


def _locate(cls: Any, values: Any, path: str, error: ErrorDetails) -> tuple[str, Any, Any]:
    """Return dotted key and value of an error, and the dataclass around it."""
    key, value, table = path, values, cls
    for part in error["loc"]:
        if isinstance(value, dict) and part in value:
            key, value = join(key, part), value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            key, value = f"{key}[{part}]", value[part]
        else:  # not a key: the type of a union, a missing element, or "[key]"
            continue
        table = _dataclass_in(typing.get_type_hints(table).get(str(part))) or table
    return key, value, table


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass inside a list, a table or a union."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(_dataclass_in, typing.get_args(hint))), None)


_WORDS = {  # pydantic's and ours
    "greater than or equal to": "at least", "less than or equal to": "at most", "greater than": "above",
    "less than": "below", "an object": "a table", "valid array": "list", "a valid integer": "an integer",
    "a valid boolean": "true or false", "a valid number": "a number", "a valid string": "text",
}  # fmt: skip


def _words(error: ErrorDetails) -> str:
    """Return pydantic's message in the words of the other messages."""
    if error["type"] == "missing":
        return f"must have an element [{error['loc'][-1]}]"
    words = re.sub(r"^(Value error, |(Input|String|Tuple) should (?=be|have|match)|)", "", error["msg"])
    words = words if words.startswith("must") else f"must {words}"
    for theirs, ours in _WORDS.items():
        words = words.replace(theirs, ours)
    return words


def unknown(path: str, key: str, names: Iterable[str]) -> str:
    """Return the sentence for an unknown key of a table at `path` whose keys are `names`."""
    names = sorted(names)
    close = [name for name in names if name == FORMER.get(key)] or difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {join(path, close[0])!r}?" if close else f"choose from {', '.join(names)}"
    return f"unknown key {join(path, key)!r}; {hint}"


def join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
