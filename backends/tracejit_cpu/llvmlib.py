"""llvmlite's LLVM library, two ways: its C functions called directly, or through ``llvmlite.binding``. ``host.py`` picks.

Importing ``llvmlite.binding`` takes 30 ms of Python, more than anything else in a process whose programs are in the disk
cache, and it lets one thread at a time into LLVM. The few functions needed here have had the same C signatures in every
llvmlite named in :data:`_KNOWN`; with any other version :class:`Public` does the same through the documented interface.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Protocol

#: Versions of llvmlite whose C signatures were compared with the ones below.
_KNOWN = ("0.46.", "0.47.", "0.48.", "0.49.", "0.50.")

_OUT = POINTER(c_char_p)
#: Result and parameter types of the C functions.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "AddSymbol": (None, (c_char_p, c_void_p)),
    "ContextCreate": (c_void_p, ()),
    "ContextDispose": (None, (c_void_p,)),
    "CreateMCJITCompiler": (c_void_p, (c_void_p, c_void_p, c_bool, _OUT)),
    "CreateNewModulePassManager": (c_void_p, ()),
    "CreateObjectFile": (c_void_p, (c_char_p, c_size_t)),
    "CreatePassBuilder": (c_void_p, (c_void_p, c_void_p)),
    "CreatePipelineTuningOptions": (c_void_p, ()),
    "CreateTargetMachine": (
        c_void_p,
        (c_void_p, c_char_p, c_char_p, c_char_p, c_int, c_char_p, c_char_p, c_int, c_int, c_char_p),
    ),
    "DisposeExecutionEngine": (None, (c_void_p,)),
    "DisposeMemoryBuffer": (None, (c_void_p,)),
    "DisposeModule": (None, (c_void_p,)),
    "DisposeNewModulePassManger": (None, (c_void_p,)),  # spelt so
    "DisposeObjectFile": (None, (c_void_p,)),
    "DisposePassBuilder": (None, (c_void_p,)),
    "DisposePipelineTuningOptions": (None, (c_void_p,)),
    "DisposeString": (None, (c_char_p,)),
    "FinalizeObject": (None, (c_void_p,)),
    "GetBufferSize": (c_size_t, (c_void_p,)),
    "GetBufferStart": (c_void_p, (c_void_p,)),
    "GetFunctionAddress": (c_uint64, (c_void_p, c_char_p)),
    "GetGlobalValueAddress": (c_uint64, (c_void_p, c_char_p)),
    "GetHostCPUFeatures": (c_int, (_OUT,)),
    "GetProcessTriple": (None, (_OUT,)),
    "GetTargetFromTriple": (c_void_p, (c_char_p, _OUT)),
    "GetVersionInfo": (c_uint, ()),
    "InitializeNativeAsmPrinter": (None, ()),
    "InitializeNativeTarget": (None, ()),
    "LoadLibraryPermanently": (c_bool, (c_char_p, _OUT)),
    "MCJITAddObjectFile": (None, (c_void_p, c_void_p)),
    "ParseAssembly": (c_void_p, (c_void_p, c_char_p, _OUT)),
    "RunNewModulePassManager": (None, (c_void_p, c_void_p, c_void_p)),
    "SetCommandLine": (None, (c_char_p, c_char_p)),
    "TargetMachineEmitToMemory": (c_void_p, (c_void_p, c_void_p, c_int, _OUT)),
    "VerifyModule": (c_bool, (c_void_p, _OUT)),
    "module_AddSROAPass": (None, (c_void_p,)),
    "module_AddSimplifyCFGPass": (None, (c_void_p,)),
}

# A third of code generation time for nothing: our loops already step their own addresses.
_OPTION = "-disable-lsr"
# libm's functions are looked up in the process
_LIBM = "libm.so.6" if sys.platform.startswith("linux") else ""


class Engine(Protocol):
    """Object code in memory; it goes with the engine."""

    def function(self, name: str) -> int:
        """Address of a function; 0 if there is none."""
        ...

    def table(self, name: str) -> int:
        """Address of a global variable; 0 if there is none."""
        ...


class Library(Protocol):
    """What ``codecache.py`` and ``host.py`` ask of LLVM."""

    @property
    def version(self) -> tuple[int, ...]:
        """The version of LLVM."""
        ...

    def triple(self) -> str:
        """The target triple of this process."""
        ...

    def features(self) -> dict[str, bool]:
        """The processor's features."""
        ...

    def machine(self, triple: str, features: str, level: int, reloc: str) -> Any:
        """A target machine that generates code at ``level`` (0 to 3)."""
        ...

    def generate(
        self, ir: str, machine: Any, passes: Any, assembly: bool = False, verify: bool = False
    ) -> bytes:
        """Object code (or assembly) of IR with stack slots promoted and blocks tidied; ``passes`` is the machine for that.

        Raises RuntimeError for malformed IR.
        """
        ...

    def add_symbol(self, name: str, address: int) -> None:
        """Make ``address`` known to object code under ``name``."""
        ...

    def load(self, code: bytes, triple: str, features: str) -> Engine:
        """Load object code."""
        ...


class Direct:
    """The C functions of the library. Calls release the GIL; several threads may generate code at once."""

    def __init__(self, path: str) -> None:
        library = _open(path)
        self._call: dict[str, Any] = {}
        for name, (result, parameters) in _SIGNATURES.items():
            function = getattr(library, f"LLVMPY_{name}")
            function.restype, function.argtypes = result, parameters
            self._call[name] = function
        self._call["InitializeNativeTarget"]()
        self._call["InitializeNativeAsmPrinter"]()
        self._call["SetCommandLine"](b"", _OPTION.encode())
        if _LIBM:
            with _text(self) as out:
                self._call["LoadLibraryPermanently"](_LIBM.encode(), byref(out))
        self._context: int | None = None  # of the empty modules behind engines: LLVM wants one for each
        self._dead: list[int] = []  # engines to free with the next load

    @property
    def version(self) -> tuple[int, ...]:
        """See :class:`Library`."""
        number = int(self._call["GetVersionInfo"]())
        return tuple(number.to_bytes(4, "big").lstrip(b"\0"))

    def triple(self) -> str:
        """See :class:`Library`."""
        with _text(self) as out:
            self._call["GetProcessTriple"](byref(out))
            return (out.value or b"").decode()

    def features(self) -> dict[str, bool]:
        """See :class:`Library`."""
        with _text(self) as out:
            if not self._call["GetHostCPUFeatures"](byref(out)):
                return {}
            names = (out.value or b"").decode().split(",")
        return {name[1:]: name[0] == "+" for name in names if name}

    def machine(self, triple: str, features: str, level: int, reloc: str) -> int:
        """See :class:`Library`."""
        with _text(self) as out:
            target = self._call["GetTargetFromTriple"](triple.encode(), byref(out))
            if not target:
                raise RuntimeError((out.value or b"").decode())
        # MCJIT takes only ELF on Windows
        name = (triple + "-elf" if os.name == "nt" else triple).encode()
        found = self._call["CreateTargetMachine"](
            target, name, b"", features.encode(), level, reloc.encode(), b"jitdefault", 0, 1, b""
        )
        if not found:
            raise RuntimeError(f"LLVM has no target machine for {triple}")
        return int(found)

    def generate(
        self, ir: str, machine: int, passes: int, assembly: bool = False, verify: bool = False
    ) -> bytes:
        """See :class:`Library`."""
        call = self._call
        context = call["ContextCreate"]()
        try:
            module = self._parse(ir, context)
            try:
                self._tidy(module, passes)
                if verify:
                    with _text(self) as out:
                        if call["VerifyModule"](module, byref(out)):
                            raise RuntimeError((out.value or b"").decode())
                with _text(self) as out:
                    buffer = call["TargetMachineEmitToMemory"](machine, module, int(not assembly), byref(out))
                    if not buffer:
                        raise RuntimeError((out.value or b"").decode())
                try:
                    return ctypes.string_at(call["GetBufferStart"](buffer), call["GetBufferSize"](buffer))
                finally:
                    call["DisposeMemoryBuffer"](buffer)
            finally:
                call["DisposeModule"](module)
        finally:
            call["ContextDispose"](context)

    def _parse(self, ir: str, context: int) -> int:
        with _text(self) as out:
            module = self._call["ParseAssembly"](context, ir.encode(), byref(out))
            if out.value or not module:
                raise RuntimeError(f"LLVM IR parsing error\n{(out.value or b'').decode()}")
        return int(module)

    def _tidy(self, module: int, passes: int) -> None:
        call = self._call
        options = call["CreatePipelineTuningOptions"]()
        builder = call["CreatePassBuilder"](passes, options)
        manager = call["CreateNewModulePassManager"]()
        call["module_AddSROAPass"](manager)
        call["module_AddSimplifyCFGPass"](manager)
        call["RunNewModulePassManager"](manager, module, builder)
        call["DisposeNewModulePassManger"](manager)
        call["DisposePassBuilder"](builder)
        call["DisposePipelineTuningOptions"](options)

    def add_symbol(self, name: str, address: int) -> None:
        """See :class:`Library`."""
        self._call["AddSymbol"](name.encode(), address)

    def load(self, code: bytes, triple: str, features: str) -> _DirectEngine:
        """See :class:`Library`."""
        call = self._call
        while self._dead:
            call["DisposeExecutionEngine"](self._dead.pop())
        if self._context is None:
            self._context = call["ContextCreate"]()
        module = self._parse(f'target triple = "{triple}"\n', self._context)
        own_memory = _machine() in ("arm64", "aarch64")
        with _text(self) as out:
            engine = call["CreateMCJITCompiler"](
                module, self.machine(triple, features, 2, "default"), own_memory, byref(out)
            )
            if not engine:
                raise RuntimeError((out.value or b"").decode())
        file = call["CreateObjectFile"](code, len(code))
        call["MCJITAddObjectFile"](engine, file)
        call["DisposeObjectFile"](file)
        call["FinalizeObject"](engine)
        return _DirectEngine(self, engine)


class _DirectEngine:
    """An MCJIT engine."""

    def __init__(self, library: Direct, engine: int) -> None:
        self._library, self._engine = library, engine

    def function(self, name: str) -> int:
        """See :class:`Engine`."""
        return int(self._library._call["GetFunctionAddress"](self._engine, name.encode()))

    def table(self, name: str) -> int:
        """See :class:`Engine`."""
        return int(self._library._call["GetGlobalValueAddress"](self._engine, name.encode()))

    def __del__(self) -> None:
        # Not freed here: the collector comes at any moment, and a process that is being forked just then would leave the
        # locks of the C library for stack frames taken in the child.
        self._library._dead.append(self._engine)


@contextlib.contextmanager
def _text(library: Direct) -> Iterator[c_char_p]:
    """A text that the library returns."""
    out = c_char_p(None)
    try:
        yield out
    finally:
        if out:
            library._call["DisposeString"](out)


def _open(path: str) -> ctypes.CDLL:
    """The shared library. Linking its 180 MB takes a while: Python's own loader would hold the GIL all the time."""
    if os.name == "posix":
        with contextlib.suppress(OSError, AttributeError):
            dlopen = ctypes.CDLL(None).dlopen
            dlopen.restype, dlopen.argtypes = c_void_p, (c_char_p, c_int)
            dlopen(os.fsencode(path), os.RTLD_NOW | os.RTLD_LOCAL)
    return ctypes.CDLL(path)


def _machine() -> str:
    import platform

    return platform.machine().lower()


class Public:
    """The same through ``llvmlite.binding``, for versions of llvmlite not known here."""

    def __init__(self) -> None:
        import llvmlite.binding as binding

        with contextlib.suppress(RuntimeError):  # newer ones initialise by themselves
            binding.initialize_native_target()
            binding.initialize_native_asmprinter()
        with contextlib.suppress(RuntimeError, ValueError):
            binding.set_option("", _OPTION)
        if _LIBM:
            with contextlib.suppress(RuntimeError):
                binding.load_library_permanently(_LIBM)
        self._binding = binding

    @property
    def version(self) -> tuple[int, ...]:
        """See :class:`Library`."""
        return tuple(self._binding.llvm_version_info)

    def triple(self) -> str:
        """See :class:`Library`."""
        return str(self._binding.get_process_triple())

    def features(self) -> dict[str, bool]:
        """See :class:`Library`."""
        try:
            return dict(self._binding.get_host_cpu_features())
        except RuntimeError:
            return {}

    def machine(self, triple: str, features: str, level: int, reloc: str) -> Any:
        """See :class:`Library`."""
        target = self._binding.Target.from_triple(triple)
        return target.create_target_machine(cpu="", features=features, opt=level, reloc=reloc, jit=True)

    def generate(
        self, ir: str, machine: Any, passes: Any, assembly: bool = False, verify: bool = False
    ) -> bytes:
        """See :class:`Library`."""
        binding = self._binding
        module = binding.parse_assembly(ir)
        builder = binding.create_pass_builder(passes, binding.create_pipeline_tuning_options(speed_level=1))
        manager = binding.create_new_module_pass_manager()
        manager.add_sroa_pass()
        manager.add_simplify_cfg_pass()
        manager.run(module, builder)
        if verify:
            module.verify()
        if assembly:
            return str(machine.emit_assembly(module)).encode()
        return bytes(machine.emit_object(module))

    def add_symbol(self, name: str, address: int) -> None:
        """See :class:`Library`."""
        self._binding.add_symbol(name, address)

    def load(self, code: bytes, triple: str, features: str) -> _PublicEngine:
        """See :class:`Library`."""
        binding = self._binding
        empty = binding.parse_assembly(f'target triple = "{triple}"\n')
        engine = binding.create_mcjit_compiler(empty, self.machine(triple, features, 2, "default"))
        engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return _PublicEngine(engine)


class _PublicEngine:
    """An MCJIT engine of llvmlite's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def function(self, name: str) -> int:
        """See :class:`Engine`."""
        return int(self._engine.get_function_address(name))

    def table(self, name: str) -> int:
        """See :class:`Engine`."""
        return int(self._engine.get_global_value_address(name))


def open_library() -> Library:
    """LLVM, the quick way where that is known to be right; ``TRACEJIT_CPU_LLVM=public`` takes the other one."""
    if os.environ.get("TRACEJIT_CPU_LLVM") != "public":
        import llvmlite

        if str(llvmlite.__version__).startswith(_KNOWN):
            name = {"win32": "llvmlite.dll", "darwin": "libllvmlite.dylib"}.get(
                sys.platform, "libllvmlite.so"
            )
            path = os.path.join(os.path.dirname(llvmlite.__file__), "binding", name)
            if os.path.isfile(path):
                return Direct(path)
    return Public()
