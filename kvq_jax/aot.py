# SPDX-License-Identifier: Apache-2.0
"""Compiles for TPUs on a machine that has none: does it fit, and what would it take.

libtpu is the whole compiler and runs without a chip. A check that fails inside it ends the process,
so that every program is compiled in one of its own, with the settings that libtpu wants.
"""

import dataclasses
import importlib.util
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # a TPU that is there is left alone
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it, one of two at once aborts at a lock file
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to wait for
    "TPU_LOG_DIR": "disabled",
    # Whatever the chip compiled for: what libtpu warns about if it can't find it.
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as JAX sees it.

    Attributes:
      name: as users call it.
      topologies: number of devices -> libtpu's name for so many.
      hbm_bytes: memory that a program may take of one device.
      config: libtpu's name of the cores' configuration, where its default is not JAX's.
    """

    name: str
    topologies: Mapping[int, str]
    hbm_bytes: int
    config: str | None = None


def _gib(x: float) -> int:
    return int(x * 2**30)


_FLAT = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4"}
_CUBE = {1: "1x1x1", 2: "1x1x2", 4: "2x2x1", 8: "2x2x2"}
# A device of 7x is half a chip.
_HALVES = {1: "1x1x1", 2: "1x1x1", 4: "1x2x1", 8: "2x2x1"}


def _chip(name: str, prefix: str, sizes: dict[int, str], hbm: float, config=None) -> Chip:
    names = {count: f"{prefix}:{size}" for count, size in sizes.items()}
    return Chip(name, names, _gib(hbm), config)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _chip("v4", "v4", _CUBE, 30.75, "megacore"),  # both cores of a chip are one device
        _chip("v5e", "v5e", _FLAT, 15.75),
        _chip("v5p", "v5p", _CUBE, 95.73),
        _chip("v6e", "v6e", _FLAT, 31.24),
        _chip("7x", "tpu7x", _HALVES, 94.74),
    )
}
"""By name. Memory is what libtpu 0.0.52 itself says is available when it refuses a program, to a
hundredth of a GiB: less than the data sheet's, since the runtime keeps some for itself."""


class CompileError(RuntimeError):
    """A program does not compile, or its compiler has died; the message is the compiler's."""


class DoesNotFit(CompileError):
    """A program takes more memory than the device has.

    Attributes:
      required_bytes: that it takes, as the compiler says: to a hundredth of a GiB.
      available_bytes: that there are, likewise.
    """

    def __init__(self, message: str, required_bytes: int, available_bytes: int):
        super().__init__(message)
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes are those of one device.

    Attributes:
      chip: it was compiled for.
      num_devices: of these.
      argument_bytes: of all arguments, as they lie in memory: padded to whole tiles.
      output_bytes: of all results, those that lie in a donated argument included.
      alias_bytes: of results that lie in a donated argument, and so take no memory of their own.
      temp_bytes: of everything between.
      code_bytes: of the program.
      peak_bytes: that arguments, results and everything between take at once at the most.
      seconds: that tracing and compiling took.
      hlo: the optimized program as text.
    """

    chip: str
    num_devices: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    peak_bytes: int
    seconds: float
    hlo: str = dataclasses.field(repr=False)


def compile_for(
    chip: str,
    function: Callable,
    *shapes: Any,
    donate_argnums: int | Sequence[int] = (),
    mesh: Mapping[str, int] | None = None,
    specs: Sequence[Any] | None = None,
    flags: str = "",
    timeout: float = 600.0,
) -> Compiled:
    """Compiles a function for a TPU in a process of its own; needs no TPU, but libtpu.

    The process is a fresh Python with JAX on the CPU and the environment of this one. It imports
    the function by name. What the function needs besides arrays is bound to it with
    `functools.partial`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kvq_jax import aot
      >>> x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
      >>> aot.compile_for("v5e", jnp.matmul, x, x).argument_bytes  # doctest: +SKIP
      4194304

    Args:
      chip: one of `CHIPS`.
      function: a function of an importable module, or a `functools.partial` of one.
      *shapes: its arguments: pytrees of `jax.ShapeDtypeStruct`, or of arrays, of which only the
        shapes count.
      donate_argnums: arguments whose memory the results may take.
      mesh: sizes of a mesh's axes by name, for a program of several devices; `jax.shard_map`
        inside the function finds it by itself. None is one device.
      specs: a `PartitionSpec` for each argument, or a pytree prefix of them; None leaves a copy of
        everything on every device.
      flags: of libtpu, besides those in the environment's `LIBTPU_INIT_ARGS`.
      timeout: seconds to wait for the compiler.

    Raises:
      DoesNotFit: the program takes more memory than the device has.
      CompileError: the function raises, or the compiler refuses it or dies of it.
      ValueError: for an unknown chip, a mesh that it has not, or a function that can't be imported
        elsewhere.
      ModuleNotFoundError: libtpu isn't installed.
      TimeoutError: it took too long.
    """
    if chip not in CHIPS:
        raise ValueError(f"unknown chip {chip!r}: choose from {', '.join(CHIPS)}")
    num_devices = int(np.prod(list((mesh or {}).values()), dtype=int))
    if num_devices not in CHIPS[chip].topologies:
        counts = ", ".join(map(str, CHIPS[chip].topologies))
        raise ValueError(
            f"mesh {dict(mesh or {})} is of {num_devices} devices; {chip} has {counts}"
        )
    if specs is not None and len(specs) != len(shapes):
        raise ValueError(f"{len(specs)} specs for {len(shapes)} arguments: give one for each")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU takes its compiler: pip install libtpu", name="libtpu"
        )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    request = _pickle((CHIPS[chip], function, shapes, donate_argnums, mesh, specs), function)
    # The child must find the module where this process found it, such as beside a script.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    settings = {"PYTHONPATH": paths, "LIBTPU_INIT_ARGS": flags}
    try:
        run = subprocess.run(
            [sys.executable, "-c", "from kvq_jax import aot; aot._serve()"],
            input=request,
            capture_output=True,
            env=os.environ | _ENVIRONMENT | settings,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"compiling for {chip} was not done after {timeout:g} seconds: give it more with "
            "timeout, or the program fewer layers"
        ) from error
    if not run.stdout:
        raise CompileError(_obituary(chip, run.returncode, run.stderr.decode(errors="replace")))
    reply = pickle.loads(run.stdout)
    if isinstance(reply, Compiled):
        return reply
    raise _error(chip, *reply)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler foretells of a Pallas kernel, without having run it.

    Attributes:
      cycles: that libtpu's simulation of the schedule takes, copies and trips of loops included.
        It does not know that copies share the memory's bandwidth, and takes a branch that depends
        on data as not taken.
      bundles: instruction words of the program.
      uses: of each unit of the core, in these.
      capacity: of each unit, in one.
    """

    cycles: int
    bundles: int
    uses: Mapping[str, int]
    capacity: Mapping[str, int]


def simulate(
    chip: str, function: Callable, *shapes: Any, kernel: str, timeout: float = 600.0
) -> Schedule:
    """Compiles a function with a Pallas kernel, and returns what is foretold of the kernel.

    Some operations make the simulation die, where the compiler alone would do.

    Args:
      chip: as in `compile_for`; v4 is not simulated.
      function: as in `compile_for`.
      *shapes: as in `compile_for`.
      kernel: name of the `pallas_call`.
      timeout: as in `compile_for`.

    Raises:
      ValueError: the program has no such kernel.
      CompileError: as in `compile_for`, or the simulation dies.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        flags = (
            f"--xla_jf_dump_to={folder}/code --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_static_llo_profile_to={folder}/profile"
        )
        compile_for(chip, function, *shapes, flags=flags, timeout=timeout)
        profiles = list(folder.glob(f"profile/{kernel}.*textproto"))
        tables = list(folder.glob(f"code/*-{kernel}.*-final_*-per-bundle-utilization.txt"))
        if len(profiles) != 1 or len(tables) != 1:
            raise ValueError(f"the program has {len(profiles)} kernels of the name {kernel!r}")
        cycles = re.search(r"estimated_cycles: (\d+)", profiles[0].read_text())
        # A title, the names of the units, how many each has, and a line for each bundle.
        _, names, *rows = tables[0].read_text().splitlines()
    numbers = [[int(x) for x in row.split()] for row in rows if row.strip()[:1].isdigit()]
    if cycles is None:
        raise CompileError(f"libtpu's simulation says nothing of {kernel!r}")
    capacity, *bundles = numbers
    units = [name.strip() for name in names.split(",")]
    return Schedule(
        cycles=int(cycles[1]),
        bundles=len(bundles),
        uses=dict(zip(units, map(sum, zip(*bundles, strict=True)), strict=True)),
        capacity=dict(zip(units, capacity, strict=True)),
    )


def _pickle(request: Any, function: Callable) -> bytes:
    try:
        pickled = pickle.dumps(request)
        reason = "__main__ is another module there" if b"__main__" in pickled else ""
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        pickled, reason = b"", str(error)
    if reason:
        raise ValueError(
            f"{function} can't be sent to the compiling process ({reason}): it must be, with all "
            "that is bound to it, of the top level of an importable module"
        )
    return pickled


def _serve() -> None:
    """Compiles what stdin asks for and answers on stdout; the child's side of `compile_for`."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what anyone prints must not get between
        try:
            reply = _compile(*pickle.load(sys.stdin.buffer))
        except Exception as error:
            reply = type(error).__name__, str(error), traceback.format_exc()
        pickle.dump(reply, out)


def _compile(
    chip: Chip,
    function: Callable,
    shapes: tuple[Any, ...],
    donate_argnums: int | Sequence[int],
    mesh: Mapping[str, int] | None,
    specs: Sequence[Any] | None,
) -> Compiled:
    start = time.perf_counter()
    sizes = dict(mesh or {"device": 1})
    num_devices = int(np.prod(list(sizes.values())))
    options = {"chip_config_name": chip.config} if chip.config else {}
    topology = topologies.get_topology_desc(chip.topologies[num_devices], platform="tpu", **options)
    devices = np.array(topology.devices[:num_devices]).reshape(tuple(sizes.values()))
    placed = Mesh(devices, tuple(sizes))

    def place(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(placed, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    specs = tuple(specs) if specs is not None else (PartitionSpec(),) * len(shapes)
    arguments = jax.tree.map(
        place, specs, tuple(shapes), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    # Some rules of tracing ask for the kind of device, which otherwise is this machine's.
    with jax.sharding.use_abstract_mesh(placed.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate_argnums).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if memory is None or hlo is None:  # as JAX declares; libtpu always tells
        raise NotImplementedError("this libtpu does not tell what memory a program takes")
    return Compiled(
        chip=chip.name,
        num_devices=num_devices,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        seconds=time.perf_counter() - start,
        hlo=hlo,
    )


# "... required for HLO temporaries (17.26G) exceeds available HBM (15.75G)", or, with a list of
# the largest buffers after it, "Used 23.51G of 15.75G hbm".
_SIZE = r"([\d.]+)([KMGT])"
_HBM = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)|Used {_SIZE} of {_SIZE} hbm")


def _error(chip: str, kind: str, message: str, trace: str) -> CompileError:
    """Returns the exception for one that the child has raised."""
    if kind == "JaxRuntimeError" and (match := _HBM.search(message)):
        required, unit, available, of = (x for x in match.groups() if x)
        return DoesNotFit(message, _bytes(required, unit), _bytes(available, of))
    error = CompileError(f"compiling for {chip} failed: {kind}: {message}")
    error.add_note(f"In the compiling process:\n{trace}")
    return error


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit))


def _obituary(chip: str, code: int, log: str) -> str:
    """Returns the message for a child that died before it answered."""
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # What libtpu logs on its way out says nothing of the cause.
    lines = [line for line in log.splitlines() if line.strip() and " RAW: " not in line]
    # A failed check is a line of level F, often twice; without one, whatever came last.
    fatal = list(dict.fromkeys(line for line in lines if re.match(r"F\d{4} ", line)))
    return "\n".join(
        [f"the compiler for {chip} died ({how}) of this program", *(fatal or lines[-5:])]
    )
