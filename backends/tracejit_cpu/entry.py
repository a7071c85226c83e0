"""The native Python entry: one C-level function that serves every program, driven by a per-program table.

``f(inputs)`` checks the arrays, takes result arrays from a pool, releases the GIL, launches the program, and returns
the list of results: about 0.2 us of overhead. Whatever it does not understand it hands to a Python function. The layout
of NumPy's array object is verified at start; where it differs (free-threaded builds) programs run through Python.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit_cpu import runtime
from tracejit_cpu.host import once

RING = 4  # result arrays kept per output

# Slots of the per-program context, in 8-byte words.
_STATE, _PROGRAM, _TABLE, _THREADS, _NIN, _NOUT, _INS, _OUTS, _SLOW, _BUSY = range(10)
_ARRAY_TYPE, _FLOAT_TYPE, _LONG_TYPE, _LIST_TYPE, _TRUE, _FALSE, _PARKED = range(10, 17)
_CONTEXT_WORDS = 24
_IN_WORDS = 4  # kind, descr, table slot, scalar slot
_OUT_WORDS = 8  # ndim, descr, table slot, dims, next, flags, ring objects (pointer), ring data (pointer)

_SYMBOLS = (
    "PyList_New",
    "PyList_SetItem",
    "PyList_Size",
    "PyList_GetItem",
    "PyTuple_GetItem",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "PyFloat_AsDouble",
    "PyLong_AsLongLongAndOverflow",
    "PyObject_CallFunctionObjArgs",
    "Py_DecRef",
    "Py_IncRef",
)


def entry_ir() -> str:
    """LLVM IR of ``tj_entry(self, inputs)``, for ``support.py``; ``self`` is the NumPy array that holds the context."""

    def field(name: str, word: int, base: str = "%ctx", ty: str = "i64") -> str:
        return (
            f"  %{name}.p = getelementptr i64, ptr {base}, i64 {word}\n  %{name} = load {ty}, ptr %{name}.p\n"
        )

    return f"""
declare ptr @PyList_New(i64)
declare i32 @PyList_SetItem(ptr, i64, ptr)
declare ptr @PyList_GetItem(ptr, i64)
declare ptr @PyTuple_GetItem(ptr, i64)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare double @PyFloat_AsDouble(ptr)
declare i64 @PyLong_AsLongLongAndOverflow(ptr, ptr)
declare ptr @PyObject_CallFunctionObjArgs(ptr, ...)
declare void @Py_DecRef(ptr)
declare void @Py_IncRef(ptr)
declare ptr @tj_array_empty(i32, ptr, ptr, i32)

define ptr @tj_entry(ptr %self, ptr %inputs) {{
entry:
  %over = alloca i32
  %ctx.p = getelementptr i8, ptr %self, i64 16
  %ctx = load ptr, ptr %ctx.p
{field("slow", _SLOW, ty="ptr")}{field("state", _STATE, ty="ptr")}{field("threads", _THREADS)}
  %many = icmp ugt i64 %threads, 1
  br i1 %many, label %check.pool, label %lock
check.pool:
  %started.p = getelementptr i8, ptr %state, i64 {runtime.STARTED}
  %started = load atomic i32, ptr %started.p acquire, align 4
  %down = icmp eq i32 %started, 0
{field("portable", _PARKED)}
  %sleepy = icmp ne i64 %portable, 0
  %defer = or i1 %down, %sleepy
  br i1 %defer, label %slow.unlocked, label %lock
lock:
  %busy.p = getelementptr i64, ptr %ctx, i64 {_BUSY}
  %pair = cmpxchg ptr %busy.p, i64 0, i64 1 acquire monotonic
  %got = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %got, label %begin, label %slow.unlocked
begin:
{field("table", _TABLE, ty="ptr")}{field("nin", _NIN)}{field("ins", _INS, ty="ptr")}
{field("nout", _NOUT)}{field("outs", _OUTS, ty="ptr")}{field("array.type", _ARRAY_TYPE, ty="ptr")}
{field("float.type", _FLOAT_TYPE, ty="ptr")}{field("long.type", _LONG_TYPE, ty="ptr")}
{field("list.type", _LIST_TYPE, ty="ptr")}{field("true", _TRUE, ty="ptr")}{field("false", _FALSE, ty="ptr")}
  %seq.type.p = getelementptr i8, ptr %inputs, i64 8
  %seq.type = load ptr, ptr %seq.type.p
  %is.list = icmp eq ptr %seq.type, %list.type
  br label %in.head

in.head:
  %i = phi i64 [ 0, %begin ], [ %i1, %in.next ]
  %in.more = icmp slt i64 %i, %nin
  br i1 %in.more, label %in.body, label %out.start
in.body:
  br i1 %is.list, label %from.list, label %from.tuple
from.list:
  %obj.l = call ptr @PyList_GetItem(ptr %inputs, i64 %i)
  br label %have
from.tuple:
  %obj.t = call ptr @PyTuple_GetItem(ptr %inputs, i64 %i)
  br label %have
have:
  %obj = phi ptr [ %obj.l, %from.list ], [ %obj.t, %from.tuple ]
  %spec.at = mul i64 %i, {_IN_WORDS}
  %spec = getelementptr i64, ptr %ins, i64 %spec.at
  %kind = load i64, ptr %spec
{field("descr", 1, "%spec", "ptr")}{field("slot", 2, "%spec")}{field("scalar", 3, "%spec", "ptr")}
  %type.p = getelementptr i8, ptr %obj, i64 8
  %type = load ptr, ptr %type.p
  %is.array = icmp eq ptr %type, %array.type
  br i1 %is.array, label %array, label %not.array
array:
  %flags.p = getelementptr i8, ptr %obj, i64 64
  %flags = load i32, ptr %flags.p
  %needed = and i32 %flags, 257
  %fine = icmp eq i32 %needed, 257
  %descr.p2 = getelementptr i8, ptr %obj, i64 56
  %descr.o = load ptr, ptr %descr.p2
  %same = icmp eq ptr %descr.o, %descr
  %usable = and i1 %fine, %same
  br i1 %usable, label %array.ok, label %slow.locked
array.ok:
  %data.p = getelementptr i8, ptr %obj, i64 16
  %data = load ptr, ptr %data.p
  br label %in.next
not.array:
  switch i64 %kind, label %slow.locked [ i64 1, label %as.float
    i64 2, label %as.int
    i64 3, label %as.bool ]
as.float:
  %is.float = icmp eq ptr %type, %float.type
  br i1 %is.float, label %float.ok, label %slow.locked
float.ok:
  %double = call double @PyFloat_AsDouble(ptr %obj)
  store double %double, ptr %scalar
  br label %in.next
as.int:
  %is.long = icmp eq ptr %type, %long.type
  br i1 %is.long, label %long, label %slow.locked
long:
  store i32 0, ptr %over
  %whole = call i64 @PyLong_AsLongLongAndOverflow(ptr %obj, ptr %over)
  %overflow = load i32, ptr %over
  %fits = icmp eq i32 %overflow, 0
  br i1 %fits, label %long.ok, label %slow.locked
long.ok:
  store i64 %whole, ptr %scalar
  br label %in.next
as.bool:
  %is.true = icmp eq ptr %obj, %true
  %is.false = icmp eq ptr %obj, %false
  %is.bool = or i1 %is.true, %is.false
  br i1 %is.bool, label %bool.ok, label %slow.locked
bool.ok:
  %byte = zext i1 %is.true to i8
  store i8 %byte, ptr %scalar
  br label %in.next
in.next:
  %pointer = phi ptr [ %data, %array.ok ], [ %scalar, %float.ok ], [ %scalar, %long.ok ], [ %scalar, %bool.ok ]
  %entry.p = getelementptr ptr, ptr %table, i64 %slot
  store ptr %pointer, ptr %entry.p
  %i1 = add i64 %i, 1
  br label %in.head

out.start:
  %result = call ptr @PyList_New(i64 %nout)
  br label %out.head
out.head:
  %o = phi i64 [ 0, %out.start ], [ %o1, %out.next ]
  %out.more = icmp slt i64 %o, %nout
  br i1 %out.more, label %out.body, label %launch
out.body:
  %ospec.at = mul i64 %o, {_OUT_WORDS}
  %ospec = getelementptr i64, ptr %outs, i64 %ospec.at
  %ndim = load i64, ptr %ospec
{field("odescr", 1, "%ospec", "ptr")}{field("oslot", 2, "%ospec")}
{field("odims", 3, "%ospec", "ptr")}{field("onext", 4, "%ospec")}
{field("oflags", 5, "%ospec")}{field("ring", 6, "%ospec", "ptr")}{field("ringdata", 7, "%ospec", "ptr")}
  br label %ring.head
ring.head:
  %r = phi i64 [ 0, %out.body ], [ %r1, %ring.next ]
  %ring.more = icmp slt i64 %r, {RING}
  br i1 %ring.more, label %ring.body, label %fresh
ring.body:
  %cand.p = getelementptr ptr, ptr %ring, i64 %r
  %cand = load ptr, ptr %cand.p
  %empty = icmp eq ptr %cand, null
  br i1 %empty, label %ring.next, label %ring.count
ring.count:
  %refs = load i32, ptr %cand
  %alone = icmp eq i32 %refs, 1
  br i1 %alone, label %ring.inspect, label %ring.next
ring.inspect:
  %rdata.p = getelementptr i8, ptr %cand, i64 16
  %rdata = load ptr, ptr %rdata.p
  %known.p = getelementptr ptr, ptr %ringdata, i64 %r
  %known = load ptr, ptr %known.p
  %ok1 = icmp eq ptr %rdata, %known
  %rnd.p = getelementptr i8, ptr %cand, i64 24
  %rnd = load i32, ptr %rnd.p
  %ndim32 = trunc i64 %ndim to i32
  %ok2 = icmp eq i32 %rnd, %ndim32
  %rdescr.p = getelementptr i8, ptr %cand, i64 56
  %rdescr = load ptr, ptr %rdescr.p
  %ok3 = icmp eq ptr %rdescr, %odescr
  %rflags.p = getelementptr i8, ptr %cand, i64 64
  %rflags = load i32, ptr %rflags.p
  %oflags32 = trunc i64 %oflags to i32
  %ok4 = icmp eq i32 %rflags, %oflags32
  %weak.p = getelementptr i8, ptr %cand, i64 72
  %weak = load ptr, ptr %weak.p
  %ok5 = icmp eq ptr %weak, null
  %a1 = and i1 %ok1, %ok2
  %a2 = and i1 %ok3, %ok4
  %a3 = and i1 %a1, %a2
  %a4 = and i1 %a3, %ok5
  br i1 %a4, label %dims.start, label %ring.next
dims.start:
  %rdims.p = getelementptr i8, ptr %cand, i64 32
  %rdims = load ptr, ptr %rdims.p
  br label %dims.head
dims.head:
  %d = phi i64 [ 0, %dims.start ], [ %d1, %dims.body ]
  %dims.more = icmp slt i64 %d, %ndim
  br i1 %dims.more, label %dims.body, label %reuse
dims.body:
  %x.p = getelementptr i64, ptr %rdims, i64 %d
  %x = load i64, ptr %x.p
  %y.p = getelementptr i64, ptr %odims, i64 %d
  %y = load i64, ptr %y.p
  %dims.same = icmp eq i64 %x, %y
  %d1 = add i64 %d, 1
  br i1 %dims.same, label %dims.head, label %ring.next
ring.next:
  %r1 = add i64 %r, 1
  br label %ring.head
reuse:
  br label %out.have
fresh:
  call void @Py_IncRef(ptr %odescr)
  %nd32 = trunc i64 %ndim to i32
  %new = call ptr @tj_array_empty(i32 %nd32, ptr %odims, ptr %odescr, i32 0)
  %failed = icmp eq ptr %new, null
  br i1 %failed, label %no.memory, label %install
install:
  %new.p = getelementptr i8, ptr %new, i64 16
  %new.data = load ptr, ptr %new.p
  %place = urem i64 %onext, {RING}
  %place.p = getelementptr ptr, ptr %ring, i64 %place
  %old = load ptr, ptr %place.p
  store ptr %new, ptr %place.p
  %pd.p = getelementptr ptr, ptr %ringdata, i64 %place
  store ptr %new.data, ptr %pd.p
  %onext1 = add i64 %onext, 1
  store i64 %onext1, ptr %onext.p
  %had = icmp ne ptr %old, null
  br i1 %had, label %drop, label %out.have
drop:
  call void @Py_DecRef(ptr %old)
  br label %out.have
no.memory:
  call void @Py_DecRef(ptr %result)
  store atomic i64 0, ptr %busy.p release, align 8
  ret ptr null
out.have:
  %out = phi ptr [ %cand, %reuse ], [ %new, %install ], [ %new, %drop ]
  %out.data = phi ptr [ %rdata, %reuse ], [ %new.data, %install ], [ %new.data, %drop ]
  call void @Py_IncRef(ptr %out)
  %set = call i32 @PyList_SetItem(ptr %result, i64 %o, ptr %out)
  %oentry.p = getelementptr ptr, ptr %table, i64 %oslot
  store ptr %out.data, ptr %oentry.p
  br label %out.next
out.next:
  %o1 = add i64 %o, 1
  br label %out.head

launch:
{field("program", _PROGRAM, ty="ptr")}
  %thread = call ptr @PyEval_SaveThread()
  call void @tj_launch(ptr %state, ptr %program, ptr %table, i64 %threads)
  call void @PyEval_RestoreThread(ptr %thread)
  store atomic i64 0, ptr %busy.p release, align 8
  ret ptr %result

slow.locked:
  store atomic i64 0, ptr %busy.p release, align 8
  br label %slow.unlocked
slow.unlocked:
  %answer = call ptr (ptr, ...) @PyObject_CallFunctionObjArgs(ptr %slow, ptr %inputs, ptr null)
  ret ptr %answer
}}
"""


class _MethodDef(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("meth", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


def _free_threaded() -> bool:
    """Whether this is a build without the GIL, whose objects look different."""
    if sys.version_info < (3, 13):
        return False
    if hasattr(sys, "abiflags"):
        return "t" in sys.abiflags
    import sysconfig  # Windows; elsewhere its import would take as long as a cached compilation

    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def _layout_is_known() -> bool:
    """Whether this interpreter and NumPy lay out objects as :func:`entry_ir` assumes."""
    if (
        sys.implementation.name != "cpython"
        or ctypes.sizeof(ctypes.c_void_p) != 8
        or sys.byteorder != "little"
    ):
        return False
    if _free_threaded():
        return False
    probe = np.zeros((3, 5), np.float32)
    at = id(probe)

    def word(offset: int) -> int:
        return ctypes.c_uint64.from_address(at + offset).value

    references = ctypes.c_uint32.from_address(at).value
    dims = (ctypes.c_int64 * 2).from_address(word(32))
    return (
        references == sys.getrefcount(probe) - 1
        and word(8) == id(np.ndarray)
        and word(16) == probe.ctypes.data
        and ctypes.c_int32.from_address(at + 24).value == 2
        and list(dims) == [3, 5]
        and word(56) == id(np.dtype(np.float32))
        and ctypes.c_int32.from_address(at + 64).value & 0x101 == 0x101
        and word(72) == 0
    )


def _array_empty_address() -> int:
    """Address of NumPy's ``PyArray_Empty`` from its C API table (slot 184, stable since NumPy 1.0)."""
    core = "numpy._core" if int(np.__version__.split(".")[0]) >= 2 else "numpy.core"
    umath = importlib.import_module(f"{core}._multiarray_umath")
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = get(umath._ARRAY_API, None)
    return ctypes.c_uint64.from_address(table + 184 * 8).value


@once
def symbols() -> dict[str, int] | None:
    """Addresses of the functions that the entry calls; None where only the Python path is safe."""
    if not _layout_is_known():
        return None
    found = {s: ctypes.cast(getattr(ctypes.pythonapi, s), ctypes.c_void_p).value or 0 for s in _SYMBOLS}
    found["tj_array_empty"] = _array_empty_address()
    return found


@once
def _native_entry() -> tuple[Any, Any] | None:
    """(keep-alive, method definition) of the entry; None where only the Python path is safe."""
    if symbols() is None:
        return None
    loaded = runtime.pool().loaded
    method = _MethodDef(b"tracejit_program", loaded.address("tj_entry"), 0x0008, None)  # METH_O
    return loaded, method


class Entry:
    """The callable of one program plus everything it points to. ``call`` takes the list of inputs."""

    def __init__(
        self,
        function: int,
        table: np.ndarray,
        threads: int,
        inputs: Sequence[tuple[np.dtype, tuple[int, ...], int]],
        outputs: Sequence[tuple[np.dtype, tuple[int, ...], int]],
        slow: Callable[[Any], list[Any]],
    ) -> None:
        native = _native_entry()
        assert native is not None
        pool = runtime.pool()
        self._loaded, self._method = native
        self._slow = slow
        words = np.zeros(_CONTEXT_WORDS, np.uint64)
        self._ins = np.zeros((max(1, len(inputs)), _IN_WORDS), np.uint64)
        self._outs = np.zeros((max(1, len(outputs)), _OUT_WORDS), np.uint64)
        self._scalars = np.zeros(max(1, len(inputs)), np.uint64)
        self._rings = np.zeros((max(1, len(outputs)), 2, RING), np.uint64)
        self._dims = [np.array(shape or (0,), np.int64) for _, shape, _ in outputs]
        self._dtypes = [d for d, _, _ in (*inputs, *outputs)]  # keeps the descriptors alive
        for i, (dtype, shape, slot) in enumerate(inputs):
            kind = {"float64": 1, "int64": 2, "bool": 3}.get(dtype.name, 0) if shape == () else 0
            self._ins[i] = (kind, id(dtype), slot, self._scalars.ctypes.data + 8 * i)
        for i, (dtype, shape, slot) in enumerate(outputs):
            flags = _fresh_flags(shape)
            rings = self._rings[i].ctypes.data
            self._outs[i] = (
                len(shape),
                id(dtype),
                slot,
                self._dims[i].ctypes.data,
                0,
                flags,
                rings,
                rings + 8 * RING,
            )
        words[_STATE], words[_PROGRAM], words[_TABLE] = pool.state, function, table.ctypes.data
        words[_THREADS], words[_NIN], words[_NOUT] = threads, len(inputs), len(outputs)
        words[_INS], words[_OUTS], words[_SLOW] = self._ins.ctypes.data, self._outs.ctypes.data, id(slow)
        words[_ARRAY_TYPE], words[_FLOAT_TYPE], words[_LONG_TYPE] = id(np.ndarray), id(float), id(int)
        words[_LIST_TYPE], words[_TRUE], words[_FALSE] = id(list), id(True), id(False)
        words[_PARKED] = 0 if pool.futex else 1
        self._context, self._table = words, table
        make = ctypes.pythonapi.PyCFunction_NewEx
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
        self.call: Callable[[Any], list[Any]] = make(ctypes.addressof(self._method), words, None)

    def __del__(self) -> None:
        """Give back the references that the rings hold."""
        rings = getattr(self, "_rings", None)
        if rings is None:
            return
        for address in rings[:, 0, :].ravel().tolist():
            if address:
                ctypes.pythonapi.Py_DecRef(ctypes.py_object(ctypes.cast(address, ctypes.py_object).value))
        rings[:] = 0


def _fresh_flags(shape: tuple[int, ...]) -> int:
    """The flags word of a fresh array of this shape (contiguity flags depend on it)."""
    probe = np.empty(shape, np.int8) if 0 in shape or np.prod(shape, dtype=np.float64) < 1e6 else None
    if probe is not None:
        return ctypes.c_int32.from_address(id(probe) + 64).value
    small = np.empty(tuple(min(n, 2) for n in shape), np.int8)
    return ctypes.c_int32.from_address(id(small) + 64).value


def available() -> bool:
    """Whether the native entry can be used in this interpreter."""
    return _native_entry() is not None
