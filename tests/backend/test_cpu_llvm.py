"""LLVM's C functions called directly do what ``llvmlite.binding`` does; a fork waits for the preloading thread."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import llvmlite
import numpy as np
import pytest

import tracejit as tj
from tracejit_cpu import entry, host, llvmlib, plan, runtime

IR = """
declare double @tj_twice(double)
@tj_tasks = constant [1 x ptr] [ptr @f]
define double @f(double %x) {
  %slot = alloca double
  store double %x, ptr %slot
  %y = load double, ptr %slot
  %z = call double @tj_twice(double %y)
  ret double %z
}
"""


@pytest.fixture(scope="module", params=[llvmlib.Direct, llvmlib.Public], ids=["direct", "public"])
def library(request):
    if request.param is llvmlib.Public:
        return llvmlib.Public()
    if not llvmlite.__version__.startswith(llvmlib._KNOWN):
        pytest.skip(
            f"llvmlite {llvmlite.__version__} goes through its Python interface until it is in _KNOWN"
        )
    found = llvmlib.open_library()
    assert isinstance(found, llvmlib.Direct)
    return found


def machine(library, level=2):
    return library.machine(library.triple(), host.host().features, level, "default")


def test_both_ways_tell_the_same_of_the_host(library):
    direct = host.llvm()
    assert library.version == direct.version and library.version[0] >= 15
    assert library.triple() == direct.triple()
    assert library.features() == direct.features()


def test_both_ways_make_the_same_code(library):
    x = np.ones((40, 40), np.float32)
    entry = tj.trace(lambda x: np.tanh(x @ x) + x.sum(0), device="cpu")._entry_for((x,), {})[0]
    direct = host.llvm()
    for ir in (IR, shared_ir(), entry.executable.inspect()["LLVM IR"]):
        for level in (0, 2):
            expected = direct.generate(ir, machine(direct, level), machine(direct))
            assert expected.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe"))
            assert library.generate(ir, machine(library, level), machine(library)) == expected
        text = library.generate(ir, machine(library), machine(library), assembly=True, verify=True)
        assert text == direct.generate(ir, machine(direct), machine(direct), assembly=True)


def shared_ir() -> str:
    return runtime.runtime_ir(host.host(), runtime.uses_futex()) + plan.driver_ir() + entry.entry_ir()


def test_both_ways_load_code(library):
    twice = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(lambda x: 2 * x)
    library.add_symbol("tj_twice", ctypes.cast(twice, ctypes.c_void_p).value or 0)
    engine = library.load(
        library.generate(IR, machine(library), machine(library)), library.triple(), host.host().features
    )
    address = engine.function("f")
    assert ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(address)(21.0) == 42.0
    assert ctypes.c_uint64.from_address(engine.table("tj_tasks")).value == address


def test_both_ways_refuse_malformed_code(library):
    with pytest.raises(RuntimeError, match="parsing error"):
        library.generate("define nonsense", machine(library), machine(library))
    with pytest.raises(RuntimeError):
        library.machine("no-such-triple", "", 2, "default")


def test_without_the_known_version_programs_run_all_the_same():
    code = (
        "import sys, numpy as np, tracejit as tj; x = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6);"
        "sys.stdout.write(tj.trace(lambda x: np.tanh(x) @ x.T, device='cpu')(x).tobytes().hex());"
        "assert 'llvmlite.binding' in sys.modules or sys.argv[1] != 'public'"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", code, way],
            check=True, capture_output=True, text=True,
            env={**os.environ, "TRACEJIT_CPU_LLVM": way, "TRACEJIT_CACHE_DIR": "off"},
        ).stdout
        for way in ("public", "direct")
    ]  # fmt: skip
    assert results[0] == results[1] and len(results[0]) == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_llvm_is_being_loaded():
    code = (
        "import os, warnings, numpy as np, tracejit as tj; from tracejit_cpu import preload; preload.start()\n"
        "warnings.simplefilter('ignore')\n"
        "child = os.fork()\n"
        "assert tj.trace(lambda x: x * 2, device='cpu')(np.ones(3))[0] == 2\n"
        "if not child: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
