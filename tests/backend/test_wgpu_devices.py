"""Which GPU runs a call, and what happens when there is none or it goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit.cli import main
from tracejit_wgpu import adapters, runtime
from tracejit_wgpu import backend as wgpu_backend

X = np.arange(4, dtype=np.float32)


def fake(index: int, kind: str, name: str = "card", backend: str = "Vulkan") -> adapters.Adapter:
    limits = dict(adapters.DEFAULT_LIMITS)
    return adapters.Adapter(
        index, name, "maker", kind, backend, "driver 1.0", limits, frozenset({"shader-f16"}), None
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# -- listing ---------------------------------------------------------------------------------------------------------


def test_devices_tells_vendor_type_limits_and_features(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    found = {d["name"]: d for d in json.loads(capsys.readouterr().out)}
    first = found["wgpu:0"]
    assert first["available"] and first["backend"] == "wgpu" and first["description"]
    properties = first["properties"]
    assert properties["vendor"] and properties["type"] and properties["api"] in ("Vulkan", "Metal", "D3D12")
    assert set(properties["limits"]) == set(adapters.DEFAULT_LIMITS)
    assert all(value >= adapters.DEFAULT_LIMITS[name] for name, value in properties["limits"].items())
    assert set(properties["features"]) <= set(adapters.FEATURES)
    assert main(["devices"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.replace("│", " ").split())  # the table may wrap
    assert "wgpu:0 ready" in words and properties["vendor"] in words
    for word in ("buffers up to", "bindings", "workgroup memory", "invocations", "features:"):
        assert word in words


# -- choosing --------------------------------------------------------------------------------------------------------


def test_real_gpus_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best real GPU is the default; a software adapter only when it is the only one or asked for."""
    fakes = [fake(0, "DiscreteGPU", "big"), fake(1, "IntegratedGPU", "small"), fake(2, "CPU", "llvmpipe")]
    monkeypatch.setattr(adapters, "_found", fakes)
    monkeypatch.delenv("TRACEJIT_WGPU_ADAPTER", raising=False)
    names = {
        "": 0,
        "0": 0,
        "1": 1,
        "2": 2,
        "low-power": 1,
        "high-performance": 0,
        "cpu": 2,
        "SMALL": 1,
        "maker": 0,
    }
    assert {spec: adapters.select(spec).index for spec in names} == names
    monkeypatch.setenv("TRACEJIT_WGPU_ADAPTER", "small")
    assert adapters.select("").index == 1 and adapters.select("0").index == 0


def test_enumeration_orders_by_kind_and_leaves_opengl_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import wgpu

    class Handle:
        def __init__(self, kind: str, api: str) -> None:
            self.info = {
                "adapter_type": kind, "backend_type": api, "device": f"{kind} {api}", "description": "", "vendor": "v",
            }  # fmt: skip
            self.limits: dict[str, int] = {}
            self.features: set[str] = set()

    handles = [
        Handle("CPU", "Vulkan"), Handle("DiscreteGPU", "OpenGL"), Handle("DiscreteGPU", "D3D12"),
        Handle("DiscreteGPU", "Vulkan"), Handle("IntegratedGPU", "Vulkan"),
    ]  # fmt: skip
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", lambda: handles)
    assert [a.name for a in adapters._enumerate()] == [
        "DiscreteGPU Vulkan", "DiscreteGPU D3D12", "IntegratedGPU Vulkan", "CPU Vulkan",
    ]  # fmt: skip


@pytest.mark.parametrize("spec", ["wgpu:99", "wgpu:-1", "wgpu:no such card"])
def test_an_adapter_that_is_not_there_is_an_error_with_those_that_are(spec: str) -> None:
    with pytest.raises(tj.DeviceError, match=r"no adapter matches.*there are: wgpu:0 = .*low-power"):
        tj.trace(lambda x: x + 1)(X, device=spec)


@pytest.mark.parametrize("spec", ["wgpu", "wgpu:0", "wgpu:low-power", "wgpu:high-performance"])
def test_every_way_to_name_a_device_runs_there(spec: str) -> None:
    y = tj.trace(lambda x: x + 1)(X, device=spec)
    assert y.device.startswith("wgpu:")
    np.testing.assert_array_equal(np.asarray(y), X + 1)
    with tj.device(spec):
        assert tj.trace(lambda x: x + 1)(X).device == y.device


def test_one_adapter_is_one_device_however_it_is_named() -> None:
    assert runtime.get("") is runtime.get("0")
    y = tj.trace(lambda x: x + 1)(X, device="wgpu")
    assert y.to("wgpu:0") is y


def test_the_environment_chooses_the_device() -> None:
    code = (
        "import tracejit as tj, numpy as np\nprint(tj.trace(lambda x: x + 1)(np.ones(2, np.float32)).device)"
    )
    done = python(code, TRACEJIT_DEVICE="wgpu")
    assert done.stdout == "wgpu:0\n", done.stderr
    assert done.stderr == ""  # no chatter of drivers


def test_arguments_move_to_where_the_call_runs() -> None:
    f = tj.trace(lambda a, b, c: a * b + c)
    on_gpu = tj.trace(lambda x: x + 0)(X, device="wgpu")
    np.testing.assert_array_equal(f(on_gpu, X, 1.5, device="cpu"), X * X + 1.5)
    np.testing.assert_array_equal(np.asarray(f(X, on_gpu, 1.5, device="wgpu")), X * X + 1.5)
    np.testing.assert_array_equal(f(on_gpu, on_gpu, 1.5, device="numpy"), X * X + 1.5)


# -- no driver -------------------------------------------------------------------------------------------------------

ABSENT = {"VK_DRIVER_FILES": "/nonexistent.json", "VK_ICD_FILENAMES": "/nonexistent.json"}


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="hides Vulkan drivers by the loader's environment"
)
def test_without_a_driver_the_error_says_what_to_install() -> None:
    code = """
import json, numpy as np, tracejit as tj
f = tj.trace(lambda x: x + 1)
try:
    f(np.ones(2, np.float32), device="wgpu")
except tj.DeviceError as error:
    print(error)
print(f(np.ones(2, np.float32), device="cpu"))
print([d for d in tj.devices() if d.backend == "wgpu"][0])
"""
    done = python(code, **ABSENT)
    assert done.returncode == 0, done.stderr
    error, cpu, info = done.stdout.splitlines()
    assert "no GPU adapter was found" in error and "install" in error and "vulkan" in error
    assert cpu == "[2. 2.]"
    assert "available=False" in info and "install" in info


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="hides Vulkan drivers by the loader's environment"
)
@pytest.mark.parametrize(("required", "expected"), [("1", "'wgpu'"), ("0", "")])
def test_a_required_adapter_that_is_missing_fails_the_suite(required: str, expected: str) -> None:
    code = "from tests import conftest; print([d for d in conftest._usable_devices() if d == 'wgpu'])"
    done = python(code, TRACEJIT_REQUIRE_WGPU=required, **ABSENT)
    assert done.stdout.strip() == f"[{expected}]", done.stderr


def test_install_hints_name_a_package_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setattr(sys, "platform", "linux")
    for release, word in (
        ({"ID": "debian"}, "apt install mesa-vulkan-drivers"),
        ({"ID": "rocky", "ID_LIKE": "rhel fedora"}, "dnf install"),
        ({"ID": "arch"}, "pacman -S"),
        ({"ID": "opensuse-leap", "ID_LIKE": "suse opensuse"}, "zypper install"),
        ({"ID": "alpine"}, "apk add"),
    ):
        monkeypatch.setattr(platform, "freedesktop_os_release", lambda release=release: release)
        assert word in adapters.install_hint()
    for system, word in (("darwin", "macOS"), ("win32", "DirectX 12")):
        monkeypatch.setattr(sys, "platform", system)
        assert word in adapters.install_hint()


def test_an_adapter_that_gives_no_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def request_device_sync(self, **_: Any) -> Any:
            raise RuntimeError("driver says no")

    adapter = replace(fake(0, "DiscreteGPU", "card"), handle=Broken())
    with pytest.raises(tj.DeviceError, match=r"card \(Vulkan\) gave no device: driver says no.*install"):
        runtime.Runtime(adapter)


# -- loss ------------------------------------------------------------------------------------------------------------


def test_a_lost_device_is_a_clear_error_and_the_next_call_starts_it_anew() -> None:
    f = tj.trace(lambda x: np.tanh(x) * 2)
    held = [f(X, device="wgpu")]
    old = runtime.get()
    old.device.destroy()
    with pytest.raises(tj.DeviceLostError, match=r"wgpu:0 .*was lost.*next call starts it anew"):
        f(X, device="wgpu")
    for use in (
        lambda: np.asarray(held[0]),
        lambda: f(held[0], device="wgpu"),
        lambda: f(held[0], device="cpu"),
        lambda: held[0] + 1,
    ):
        with pytest.raises(tj.DeviceLostError, match="gone"):
            use()
    assert "lost with its device" in repr(held[0]) and held[0].shape == (4,) and held[0].device == "wgpu:0"
    np.testing.assert_allclose(f(X, device="cpu"), np.tanh(X) * 2, rtol=1e-6)
    again = f(X, device="wgpu")  # the same function, the same program, a new device
    np.testing.assert_allclose(np.asarray(again), np.tanh(X) * 2, rtol=1e-6)
    assert runtime.get() is not old and runtime.get().dead is None
    held.clear()  # its buffer must not come back to the new device's pool
    np.testing.assert_allclose(np.asarray(f(again, device="wgpu")), np.tanh(np.tanh(X) * 2) * 2, rtol=1e-6)


def test_a_loss_while_training_and_while_reading() -> None:
    """Every kind of program starts again: constants, temporaries and control flow are made anew."""

    @tj.trace
    def step(w: Any, x: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            carry = np.tanh(carry @ w) + row
            return carry, carry.sum()

        last, sums = tj.scan(body, x[0], x)
        return last * np.arange(4, dtype=np.float32), sums

    w, x = np.eye(4, dtype=np.float32), np.ones((3, 4), np.float32)
    expected = step(w, x, device="numpy")
    first = step(w, x, device="wgpu")
    runtime.get().device.destroy()
    with pytest.raises(tj.DeviceLostError):
        np.asarray(first[0])
    for got, want in zip(step(w, x, device="wgpu"), expected, strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_told_that_the_gpu_stayed_with_its_parent() -> None:
    code = """
import os, warnings
import numpy as np, tracejit as tj
warnings.simplefilter("ignore")
x = np.arange(6, dtype=np.float32)
f = tj.trace(lambda x: x * 2)
kept = f(x, device="wgpu")
child = os.fork()
if child == 0:
    for use in (lambda: f(x, device="wgpu"), lambda: np.asarray(kept), lambda: tj.trace(np.sin)(x, device="wgpu")):
        try:
            use()
            print("no error")
        except tj.DeviceError as error:
            assert "forked" in str(error) and "spawn" in str(error), error
    assert f(x, device="cpu")[3] == 6
    assert not [d for d in tj.devices() if d.backend == "wgpu" and d.available]
    print("child done", flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert f(x, device="wgpu")[3] == 6
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout == "child done\n", done.stderr


def test_devices_never_raises_when_wgpu_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_found", None)
    monkeypatch.setitem(sys.modules, "wgpu", None)
    (info,) = wgpu_backend.devices()
    assert not info.available and "pip install wgpu" in info.detail
