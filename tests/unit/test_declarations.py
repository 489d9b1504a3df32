"""What Python knows of the C library comes from csrc/include/*.h, which the library carries; a difference is caught."""

from __future__ import annotations

import re
from pathlib import Path

import cffi
import pytest

from mpidl.native import library, node
from mpidl.native.declarations import declarations

HEADERS = ("mpidl.h", "mpidl_node.h", "mpidl_center.h", "mpidl_cuda.h")


def headers() -> str:
    folder = Path(__file__).parents[2] / "csrc/include"
    assert sorted(HEADERS) == sorted(path.name for path in folder.glob("*.h"))
    return "".join((folder / name).read_text() for name in HEADERS)


def declared(text: str) -> cffi.FFI:
    made = cffi.FFI()
    made.cdef(declarations(text))
    return made


def test_the_library_carries_the_headers_that_it_was_compiled_with() -> None:
    assert library._itself(library._LIBRARY) == (library._INTERFACE, headers())


def test_declarations_are_what_is_left_of_a_header() -> None:
    text = """
    /* One /* comment. */
    #ifndef GUARD_H
    #define GUARD_H
    #define TWO(x) \\
        ((x) + 2)
    #ifdef __cplusplus
    extern "C" {
    #endif
    MPIDL_API int one(void); /* a comment
        of two lines */
    #ifdef __cplusplus
    }
    #endif
    #endif
    """
    assert declarations(text).split() == ["int", "one(void);"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("int64_t count;\n    int64_t total;", "int64_t total;"),  # a field less
        ("uintptr_t input, output;", "int32_t input, output;"),
        ("} mpidl_node;", "} mpidl_nodes;"),
    ],
)
def test_a_declaration_that_differs_from_its_use_is_caught(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = re.sub(r"/\*.*?\*/", "", headers(), flags=re.DOTALL)
    text = re.sub(r"[ \t]+\n", "\n", text)
    assert before in text
    with pytest.raises((TypeError, ValueError, AttributeError, OverflowError, cffi.CDefError)):
        monkeypatch.setattr(library, "ffi", declared(text.replace(before, after)))
        use_every_struct()
    monkeypatch.setattr(library, "ffi", declared(text))
    use_every_struct()


def use_every_struct() -> None:
    end = node.end(64, 0, 1, small_nbytes=64, piece_nbytes=64, spin=0)
    job = node.job((1, 2), "allreduce", "float32", 3, (2**40, 2**41), total=5)
    assert (end.ranks, end.store_policy.wish) == (1, 0)
    assert (list(job.signature), job.count, job.total, job.input, job.output) == ([1, 2], 3, 5, 2**40, 2**41)


def test_the_codes_of_c_are_those_of_its_headers() -> None:
    """What is counted in an enumeration there and in a table here."""
    enums = {name: declared(headers()).typeof(f"enum mpidl_{name}").relements for name in ("dtype", "kind", "op")}
    codes = {f"MPIDL_{name.upper()}": code for name, code in library.DTYPES.items() if name != "bool"}
    assert codes == {name: code for name, code in enums["dtype"].items() if name != "MPIDL_DTYPES"}
    codes = {f"MPIDL_{name.upper()}": code for name, code in node.KINDS.items()}
    assert codes == {name: code for name, code in enums["kind"].items() if name != "MPIDL_KINDS"}
    names = {"sum": "SUM", "mean": "SUM", "prod": "PRODUCT", "min": "MINIMUM", "max": "MAXIMUM"}
    assert {name: enums["op"][f"MPIDL_{ours}"] for name, ours in names.items()} == node.OPERATIONS
    progress = declared(headers()).typeof("enum mpidl_progress").relements
    assert progress == {"MPIDL_DONE": node.DONE, "MPIDL_WAITING": node.WAITING, "MPIDL_DIFFERS": node.DIFFERS}
    sets = declared(headers()).typeof("enum mpidl_instructions").relements
    assert [f"MPIDL_{name.upper()}" for name in library.INSTRUCTIONS] == sorted(sets, key=sets.__getitem__)[:-1]
