"""The command line: ``tracejit devices | graph | view | export | cache | --version``. Installed as a console script.

Sub-commands that belong to a plugin (the viewer's, a backend's cache) are dispatched to it through its entry point.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from tracejit._version import __version__
from tracejit.errors import TraceError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit status (0 fine, 1 an error that was explained, 2 wrong usage)."""
    parser = _parser()
    args = list(sys.argv[1:] if argv is None else argv)
    # The viewer's commands have options of their own, which it parses itself.
    if args and args[0] in ("view", "export"):
        return _viewer_command(args[0], args[1:])
    options = parser.parse_args(args)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options) or 0)
    except TraceError as error:
        print(f"tracejit: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # e.g. `tracejit graph ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tracejit", description="A tracing JIT for Python and NumPy.")
    parser.add_argument("--version", action="version", version=f"tracejit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    devices = commands.add_parser(
        "devices", help="what can run programs here, what is missing and how to get it"
    )
    devices.add_argument("--json", action="store_true", help="print JSON")
    devices.set_defaults(run=_devices)

    graph = commands.add_parser(
        "graph",
        help="print the graph of a function",
        description="Trace MODULE:FUNCTION with zeros of the given types and print its optimised graph, e.g. "
        "tracejit graph model:predict float32[8,64] float32[64,10] 0.1",
    )
    graph.add_argument("function", help="module:function or path/to/file.py:function")
    graph.add_argument(
        "arguments",
        nargs="*",
        help="dtype[shape] for an array, or a JSON value (number, true, list of these)",
    )
    graph.add_argument(
        "--form", choices=("text", "json", "inspect"), default="text", help="what to print (default: text)"
    )
    graph.add_argument("--device", default=None, help="with --form inspect: the device to compile for")
    graph.add_argument(
        "--grad",
        action="store_true",
        help="the graph of value and gradient with respect to the first argument",
    )
    graph.set_defaults(run=_graph)

    commands.add_parser("view", help="open the window on a recording or a graph", add_help=False)
    commands.add_parser("export", help="turn a recording into a PNG, GIF or MP4", add_help=False)

    cache = commands.add_parser("cache", help="the on-disk cache of compiled code")
    cache.add_argument("--clear", action="store_true", help="delete it")
    cache.set_defaults(run=_cache)
    return parser


def _devices(options: argparse.Namespace) -> int:
    from tracejit.backend import devices, resolve

    found = devices()
    if options.json:
        print(
            json.dumps(
                [{**d.__dict__, "properties": dict(d.properties)} for d in found], indent=2, default=str
            )
        )
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    default = str(resolve(None))
    table = Table(title=f"tracejit {__version__}: devices (default: {default})", title_justify="left")
    for column in ("device=", "", "what"):
        table.add_column(column)
    for d in found:
        mark = Text("ready", style="green") if d.available else Text("missing", style="red")
        what = d.description + (f"\n{d.detail}" if d.detail else "")
        # Long facts (feature flags, limits) are for --json.
        facts = ", ".join(
            f"{k.replace('_', ' ')}: {v}"
            for k, v in d.properties.items()
            if isinstance(v, str | int | float)
            and v is not False
            and len(str(v)) <= 40
            and str(v) not in what
        )
        table.add_row(Text(d.name), mark, Text(what + (f"\n{facts}" if facts else "")))
    Console().print(table)
    return 0


def _graph(options: argparse.Namespace) -> int:
    from tracejit.autograd import value_and_grad
    from tracejit.jit import TracedFunction, trace

    function = _load(options.function)
    if not callable(function):
        raise TraceError.make(f"{options.function} is not a function but a {type(function).__name__}")
    arguments = [_argument(text) for text in options.arguments]
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise TraceError.make(f"{options.function}: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    if options.grad:
        function = trace(value_and_grad(function))
    elif not isinstance(function, TracedFunction):
        function = trace(function)
    if options.form == "inspect":
        print(function.inspect(*arguments, device=options.device))
    elif options.form == "json":
        print(json.dumps(function.graph(*arguments).to_json()))
    else:
        print(function.graph(*arguments))
    return 0


def _load(target: str) -> Any:
    """The function named ``module:function`` or ``file.py:function``; running the module is the user's own request."""
    module_name, _, attribute = target.rpartition(":")
    if not module_name or not attribute:
        raise TraceError.make(
            f"{target!r} does not name a function", hint="write module:function or file.py:function"
        )
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location("__tracejit_target__", module_name)
            if spec is None or spec.loader is None or not os.path.exists(module_name):
                raise ImportError(f"no file {module_name}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(module_name)
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise TraceError.make(f"cannot load {target!r}: {error}") from error
    return found


def _argument(text: str) -> Any:
    """``float32[8,64]`` -> zeros; anything else is JSON."""
    import numpy as np

    from tracejit.dtypes import SUPPORTED

    name, bracket, rest = text.partition("[")
    if bracket and rest.endswith("]") and name in SUPPORTED:
        try:
            shape = tuple(int(s) for s in rest[:-1].split(",") if s.strip())
            if any(s < 0 for s in shape):
                raise ValueError("negative size")
        except ValueError:
            raise TraceError.make(f"{text!r} is not of the form dtype[2,3]") from None
        return np.zeros(shape, SUPPORTED[name])
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise TraceError.make(
            f"{text!r} is neither dtype[shape] nor a JSON value", hint="e.g. float32[8,64] or 0.1"
        ) from None


def _viewer_command(command: str, argv: Sequence[str]) -> int:
    from tracejit.watching import viewer

    try:
        plugin = viewer()
        return int(getattr(plugin, f"main_{command}")(list(argv)) or 0)
    except TraceError as error:
        print(f"tracejit: {error}", file=sys.stderr)
        return 1


def _cache(options: argparse.Namespace) -> int:
    from tracejit.backend import backend_names, get_backend

    any_cache = False
    for name in backend_names():
        try:
            backend = get_backend(name)
        except TraceError:
            continue
        info = getattr(backend, "cache_info", None)
        if info is None:
            continue
        any_cache = True
        facts = info()
        if facts.get("path") is None:
            print(f"{name}: off")
        elif options.clear:
            print(f"{name}: removed {backend.cache_clear()} entries from {facts['path']}")  # type: ignore[attr-defined]
        else:
            size = facts["bytes"] / 1e6
            print(f"{name}: {facts['entries']} entries, {size:.1f} MB in {facts['path']}")
    if not any_cache:
        print("no installed backend keeps a cache on disk")
    return 0


if __name__ == "__main__":
    sys.exit(main())
