# SPDX-License-Identifier: Apache-2.0
"""What one lane of a warp computes: registers, PTX instructions and loops, inside Mosaic GPU.

Pallas speaks of arrays that a warpgroup holds together. A kernel that decodes codes in registers
has to say which lane holds what, so it is written here as CUDA would be, one lane at a time. Used
inside `plgpu.inline_mgpu`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

GLOBAL, SHARED = 1, 3


@dataclasses.dataclass(frozen=True)
class Reg:
    """A register of every lane: i32 (unsigned), i64, f32 or a predicate.

    Operators take another register of the same type or a Python number.
    """

    value: ir.Value

    def _with(self, other: Any) -> ir.Value:
        return other.value if isinstance(other, Reg) else constant(other, self.value.type).value

    def _binary(self, other, integer: Callable, floating: Callable | None) -> "Reg":
        op = floating if isinstance(self.value.type, ir.F32Type) else integer
        assert op is not None, "not for floats"
        return Reg(op(self.value, self._with(other)))

    def __radd__(self, other):
        return self + other

    def __add__(self, other):
        return self._binary(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._binary(other, arith.subi, arith.subf)

    def __mul__(self, other):
        return self._binary(other, arith.muli, arith.mulf)

    def __floordiv__(self, other):
        return self._binary(other, arith.divui, None)

    def __mod__(self, other):
        return self._binary(other, arith.remui, None)

    def __and__(self, other):
        return self._binary(other, arith.andi, None)

    def __or__(self, other):
        return self._binary(other, arith.ori, None)

    def __rshift__(self, other):
        return self._binary(other, arith.shrui, None)

    def __lshift__(self, other):
        return self._binary(other, arith.shli, None)

    def _compare(self, other, integer, floating) -> "Reg":
        if isinstance(self.value.type, ir.F32Type):
            return Reg(arith.cmpf(floating, self.value, self._with(other)))
        return Reg(arith.cmpi(integer, self.value, self._with(other)))

    def __lt__(self, other):  # integers compare as signed
        return self._compare(other, arith.CmpIPredicate.slt, arith.CmpFPredicate.OLT)

    def __le__(self, other):
        return self._compare(other, arith.CmpIPredicate.sle, arith.CmpFPredicate.OLE)

    def __gt__(self, other):
        return self._compare(other, arith.CmpIPredicate.sgt, arith.CmpFPredicate.OGT)

    def __ge__(self, other):
        return self._compare(other, arith.CmpIPredicate.sge, arith.CmpFPredicate.OGE)

    def equals(self, other) -> "Reg":
        """Returns a predicate; `==` stays Python's, for dataclasses."""
        return self._compare(other, arith.CmpIPredicate.eq, arith.CmpFPredicate.OEQ)

    def max(self, other) -> "Reg":
        """Returns the larger one; of NaN and a number the number."""
        return self._binary(other, arith.maxsi, arith.maxnumf)

    def min(self, other) -> "Reg":
        """Returns the smaller one."""
        return self._binary(other, arith.minsi, arith.minnumf)

    @property
    def bits(self) -> "Reg":
        """The i32 with the bits of a float."""
        return Reg(arith.bitcast(i32(), self.value))

    @property
    def float(self) -> "Reg":
        """The f32 with the bits of an integer."""
        return Reg(arith.bitcast(f32(), self.value))

    @property
    def wide(self) -> "Reg":
        """The i32 as i64."""
        return Reg(arith.extui(i64(), self.value))


def i32() -> ir.Type:
    """The type of 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """The type of 64-bit integers, for addresses."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """The type of floats."""
    return ir.F32Type.get()


def constant(x: Any, type_: ir.Type) -> Reg:
    """Returns a constant of a type."""
    if isinstance(type_, ir.F32Type):
        return Reg(arith.constant(type_, ir.FloatAttr.get(type_, float(x))))
    x = int(x)
    if type_ == i32() and x >= 2**31:
        x -= 2**32
    return Reg(arith.constant(type_, ir.IntegerAttr.get(type_, x)))


def integer(x: int) -> Reg:
    """Returns a constant i32."""
    return constant(x, i32())


def number(x: float) -> Reg:
    """Returns a constant f32."""
    return constant(x, f32())


def where(condition: Reg, x: Reg, y: Reg) -> Reg:
    """Returns x where the predicate holds, else y."""
    return Reg(arith.select(condition.value, x.value, y.value))


def thread_index() -> Reg:
    """Returns the index of the thread in its block."""
    return Reg(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)))


def block_index() -> Reg:
    """Returns the index of the block in a grid of one axis."""
    return Reg(arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x)))


# Instructions.


def ptx(
    code: str, operands: Sequence[Reg] = (), results: str = "", *, volatile: bool = False
) -> list[Reg]:
    """Runs PTX; `results` has a letter for each result: r an i32, f an f32, l an i64.

    Volatile code is neither moved nor dropped, and memory is written back before it.
    """
    types = {"r": i32, "f": f32, "l": i64}
    letters = {i32(): "r", f32(): "f", i64(): "l"}
    constraints = [f"={x}" for x in results] + [letters[x.value.type] for x in operands]
    if volatile:
        constraints.append("~{memory}")
    if not results:
        result = ir.Type.parse("!llvm.void")
    elif len(results) == 1:
        result = types[results]()
    else:
        result = llvm.StructType.get_literal([types[x]() for x in results])
    out = llvm.inline_asm(
        result,
        [x.value for x in operands],
        code,
        ",".join(constraints),
        has_side_effects=volatile,
    )
    if len(results) < 2:
        return [Reg(out)] * len(results)
    return [Reg(llvm.extractvalue(types[x](), out, [i])) for i, x in enumerate(results)]


def _simple(code: str, results: str = "f", volatile: bool = False) -> Callable[..., Reg]:
    def instruction(*operands: Reg) -> Reg:
        return ptx(code, operands, results, volatile=volatile)[0]

    return instruction


fma = _simple("fma.rn.f32 $0, $1, $2, $3;")
exp2 = _simple("ex2.approx.ftz.f32 $0, $1;")
log2 = _simple("lg2.approx.f32 $0, $1;")
reciprocal = _simple("rcp.approx.f32 $0, $1;")
low_half = _simple("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;}")
high_half = _simple("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h;}")
multiply_halves = _simple("mul.rn.f16x2 $0, $1, $2;", "r")
# x y - z, which is exact where z is the rounded product.
rest_of_product = _simple(
    "{.reg .b32 n; neg.f16x2 n, $3; fma.rn.f16x2 $0, $1, $2, n;}",
    "r",
)
max_halves = _simple("max.f16x2 $0, $1, $2;", "r")
# Transposes the 8 by 8 matrix of 16-bit elements of which lane l holds row l / 4, two columns.
transpose = _simple("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "r", volatile=True)


def pack(low: Reg, high: Reg, dtype: str) -> Reg:
    """Rounds two floats to a pair of "f16" or "bf16"."""
    return ptx(f"cvt.rn.{dtype}x2.f32 $0, $1, $2;", [high, low], "r")[0]


def unpack(pair: Reg, dtype: str) -> tuple[Reg, Reg]:
    """Returns the two of a pair as floats."""
    if dtype == "f16":
        return low_half(pair), high_half(pair)
    return (pair << 16).float, (pair & 0xFFFF0000).float


def mma(acc: Sequence[Reg], a: Sequence[Reg], b: Sequence[Reg], dtype: str) -> list[Reg]:
    """Returns acc + a b for a tile of 16 rows, 8 columns and a depth of 16.

    With g = lane / 4 and t = lane % 4 a lane holds, of acc, (row g, columns 2t and 2t + 1) and
    (row g + 8, likewise); of a, pairs along the depth at (row g, 2t), (g + 8, 2t), (g, 2t + 8) and
    (g + 8, 2t + 8); of b, pairs along the depth at (2t, column g) and (2t + 8, column g).
    """
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return ptx(code, [*a, *b, *acc], "ffff")


def exchange(x: Reg, lane_mask: int) -> Reg:
    """Returns the x of the lane whose index differs in these bits."""
    as_float = isinstance(x.value.type, ir.F32Type)
    out = ptx(
        f"shfl.sync.bfly.b32 $0, $1, {lane_mask}, 31, -1;",
        [x.bits if as_float else x],
        "r",
        volatile=True,
    )[0]
    return out.float if as_float else out


def reduce(x: Reg, op: Callable[[Reg, Reg], Reg], lane_masks: Sequence[int]) -> Reg:
    """Returns the reduction of x over the lanes whose indices differ in these bits."""
    for mask in lane_masks:
        x = op(x, exchange(x, mask))
    return x


def any_lane(condition: Reg) -> Reg:
    """Returns whether the predicate holds in any lane of the warp."""
    flag = where(condition, integer(1), integer(0))
    code = (
        "{.reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, -1;"
        " selp.b32 $0, 1, 0, q;}"
    )
    return ptx(code, [flag], "r", volatile=True)[0].equals(1)


# Memory.


def address(ref: ir.Value) -> Reg:
    """Returns the address of a ref's first byte: i32 in shared, i64 in global memory."""
    pointer = mgpu_utils.memref_ptr(ref)
    shared = llvm.PointerType(pointer.type).address_space == SHARED
    return Reg(llvm.ptrtoint(i32() if shared else i64(), pointer))


def _pointer(at: Reg) -> ir.Value:
    space = SHARED if at.value.type == i32() else GLOBAL
    return llvm.inttoptr(llvm.PointerType.get(space), at.value)


def load(at: Reg, count: int = 1) -> list[Reg]:
    """Loads 1, 2 or 4 consecutive words from a byte address that is aligned to all of them."""
    if count == 1:
        return [Reg(llvm.load(i32(), _pointer(at), alignment=4))]
    vector = llvm.load(ir.VectorType.get((count,), i32()), _pointer(at), alignment=4 * count)
    return [
        Reg(llvm.extractelement(vector, arith.constant(i32(), ir.IntegerAttr.get(i32(), i))))
        for i in range(count)
    ]


def load_remote(at: Reg, rank: int, count: int = 1) -> list[Reg]:
    """Loads 1 or 2 words from the shared memory of another block of the cluster."""
    (there,) = ptx(f"mapa.shared::cluster.u32 $0, $1, {rank};", [at], "r")
    if count == 1:
        return ptx("ld.shared::cluster.u32 $0, [$1];", [there], "r", volatile=True)
    code = "ld.shared::cluster.v2.u32 {$0, $1}, [$2];"
    return ptx(code, [there], "rr", volatile=True)


def store(at: Reg, x: Reg) -> None:
    """Stores a 32-bit register to a byte address."""
    llvm.store(x.value, _pointer(at), alignment=4)


def store_half(at: Reg, x: Reg, dtype: str) -> None:
    """Stores a float as one "f16" or "bf16"."""
    half = arith.trunci(ir.IntegerType.get_signless(16), pack(x, x, dtype).value)
    llvm.store(half, _pointer(at), alignment=2)


def sync_warp() -> None:
    """Waits for all lanes of the warp; their memory accesses so far come before later ones."""
    ptx("bar.warp.sync -1;", volatile=True)


def sync_threads(barrier: Reg, count: int) -> None:
    """Waits for so many threads of the block at one of its 16 barriers."""
    ptx(f"bar.sync $0, {count};", [barrier], volatile=True)


def sync_cluster() -> None:
    """Waits for all threads of the blocks of the cluster."""
    ptx("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", volatile=True)


def init_barrier(at: Reg) -> None:
    """Makes an mbarrier of one arrival, ready for the copy engine. By one thread."""
    ptx("mbarrier.init.shared::cta.b64 [$0], 1;", [at], volatile=True)
    ptx("fence.proxy.async.shared::cta;", volatile=True)


def expect_bytes(barrier: Reg, nbytes: Reg | int) -> None:
    """Arrives at an mbarrier that is to wait for copies of so many bytes. By one thread."""
    nbytes = nbytes if isinstance(nbytes, Reg) else integer(nbytes)
    code = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
    ptx(code, [barrier, nbytes], volatile=True)


def copy_async(target: Reg, source: Reg, nbytes: int, barrier: Reg) -> None:
    """Starts a copy from global to shared memory that counts down the mbarrier. By one thread.

    What is copied isn't read again soon: the L2 lets go of it first.
    """
    code = (
        "{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
        " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [$0], [$1], $2, [$3], once;}"
    )
    ptx(code, [target, source, integer(nbytes), barrier], volatile=True)


def wait_barrier(barrier: Reg, parity: Reg) -> None:
    """Waits for the phase of an mbarrier."""
    code = (
        "{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;"
        " @!p bra again;}"
    )
    ptx(code, [barrier, parity], volatile=True)


# Control flow.


def loop(start: Reg, stop: Reg, carry: Any) -> Callable[[Callable[[Reg, Any], Any]], Any]:
    """Decorates a loop's body `(index, carry) -> carry`; its name becomes the last carry."""

    def run(body):
        flat, tree = jax.tree.flatten(carry)
        one = arith.constant(i32(), 1)
        op = scf.ForOp(start.value, stop.value, one, [x.value for x in flat])
        with ir.InsertionPoint(op.body):
            inner = jax.tree.unflatten(tree, [Reg(x) for x in op.inner_iter_args])
            out = body(Reg(op.induction_variable), inner)
            scf.YieldOp([x.value for x in jax.tree.leaves(out)])
        return jax.tree.unflatten(tree, [Reg(x) for x in op.results])

    return run


def branch(condition: Reg, otherwise: Any) -> Callable[[Callable[[], Any]], Any]:
    """Decorates what to compute where a warp-uniform predicate holds; else it is `otherwise`."""

    def run(body):
        flat, tree = jax.tree.flatten(otherwise)
        op = scf.IfOp(condition.value, [x.value.type for x in flat], has_else=True)
        with ir.InsertionPoint(op.then_block):
            scf.YieldOp([x.value for x in jax.tree.leaves(body())])
        assert op.else_block is not None
        with ir.InsertionPoint(op.else_block):
            scf.YieldOp([x.value for x in flat])
        return jax.tree.unflatten(tree, [Reg(x) for x in op.results])

    return run


@contextlib.contextmanager
def when(condition: Reg):
    """Runs the block of a `with` statement where the predicate holds."""
    op = scf.IfOp(condition.value)
    with ir.InsertionPoint(op.then_block):
        yield
        scf.YieldOp([])
