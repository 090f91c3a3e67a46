"""What the kernels of several stages share: typed pointers, packed masks, the hash, the score.

Every kernel comes in two forms. FULL: chunks of whole blocks whose addresses are proven to be aligned,
read and written without bounds, 128 bits at a time. Otherwise: any address, any length, in bounds.

Every kernel sees a block of elements as [ROWS, 8]: a row is the eight elements of one mask byte. A
thread then owns whole or half rows, finds its mask bits in one byte, and needs no exchange with
other threads to tell its elements apart. Steps with 8-bit states have rows of 16, one 128-bit access.

bfloat16 values travel as their 16 bits: what is kept is kept to the bit, and what is rounded is
rounded by the integer arithmetic that the definition states.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fixed, not tuned at run time: an autotuner runs a kernel several times, and these update in place.
# Four warps with one 128-bit access a tensor and thread leave 8 or more blocks on an SM (56
# registers for float32), hence more than 64 KiB of loads in flight.
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
ALIGNMENT = 16  # bytes of the widest access

# How a tensor's elements are stored; INT8, INT4: codes, whose scales lie elsewhere (codec.py; nibbles.py, packed).
FLOAT32, BFLOAT16, INT8, INT4 = 0, 1, 2, 3
ITEM_BYTES = (4, 2, 1, 1)  # of packed codes, twice what they take: what is aligned by it is aligned

_BFLOAT16, _INT8, _INT4 = tl.constexpr(BFLOAT16), tl.constexpr(INT8), tl.constexpr(INT4)

# enable_fp_fusion: a product and a sum contracted into one rounding would change the bits.
LAUNCH = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def inlined(function):
    """``triton.jit`` for what only kernels call.

    In the interpreter a kernel has already patched the language when it calls; letting every helper
    patch it again would double a test's time.
    """
    return function if triton.knobs.runtime.interpret else triton.jit(function)


@inlined
def load_address(slot, KIND: tl.constexpr, FULL: tl.constexpr):
    """The tensor whose address lies in the table at ``slot``.

    The hint sits on the pointer: on the integer before the cast Triton drops it, and every access
    becomes 16 or 32 bits wide. It is given only where the host has proven it.
    """
    if KIND == _INT8 or KIND == _INT4:
        pointer = tl.load(slot).to(tl.pointer_type(tl.uint8))
    elif KIND == _BFLOAT16:
        pointer = tl.load(slot).to(tl.pointer_type(tl.uint16))
    else:
        pointer = tl.load(slot).to(tl.pointer_type(tl.float32))
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@inlined
def load_byte_address(slot):
    """Of a packed mask or of scales; they are read byte by byte."""
    return tl.load(slot).to(tl.pointer_type(tl.uint8))


@inlined
def load_block(pointers, in_bounds, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=in_bounds, other=0)


@inlined
def store_block(pointers, values, in_bounds, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=in_bounds)


@inlined
def load_bits(bytes_, index, limit):
    """Packed mask bytes [ROWS, 1] as int32; 0 where a byte's ``index`` in the chunk reaches ``limit``."""
    return tl.load(bytes_, mask=index < limit, other=0).to(tl.int32)


@inlined
def load_row_bits(bytes_, first, limit, WIDTH: tl.constexpr):
    """[ROWS, 1] int32: the mask bits of rows of WIDTH elements, whose first bytes are ``first`` of the chunk's."""
    bits = load_bits(bytes_ + first, first, limit)
    if WIDTH == 16:
        bits |= load_bits(bytes_ + first + 1, first + 1, limit) << 8
    return bits


@inlined
def bytes_present(address, count, FULL: tl.constexpr):
    """How many mask bytes a chunk of ``count`` elements has: none where there is no mask."""
    n_bytes = count // 8
    if not FULL:
        n_bytes = (count + 7) // 8
    return tl.where(tl.load(address) != 0, n_bytes, 0)


@inlined
def widen(raw, KIND: tl.constexpr):
    """Stored value, no code, -> float32, exactly."""
    if KIND == _BFLOAT16:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw


@inlined
def is_finite(x):
    return tl.abs(x) < float("inf")


@inlined
def mix(x):
    """lowbias32 of a uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@inlined
def round_bfloat16(x, random_bits, STOCHASTIC: tl.constexpr):
    """float32 -> bf16 bits: up by 16 random bits, or to nearest even; then cut.

    Integer arithmetic, because the interpreter's own conversion truncates. A NaN that arithmetic made
    has its upper mantissa bit set: cut, it is still one.
    """
    word = x.to(tl.uint32, bitcast=True)
    if STOCHASTIC:
        increment = random_bits
    else:
        increment = 0x7FFF + ((word >> 16) & 1)
    return ((word + tl.where(is_finite(x), increment, 0)) >> 16).to(tl.uint16)


@inlined
def score(u, shift, scale, isolated, keep_factor, HYSTERESIS: tl.constexpr):
    """``reference.stats.score``, but for the sign of a zero, which ``score_key`` takes care of."""
    result = tl.where(scale == 0.0, 0.0, tl.div_rn(u - shift, scale + tl.zeros_like(u)))
    if HYSTERESIS:
        result = tl.where(isolated, tl.div_rn(result, keep_factor + tl.zeros_like(u)), result)
    return result


@inlined
def score_key(value):
    """``reference.threshold.score_keys`` as uint32; both zeros have one key."""
    word = value.to(tl.uint32, bitcast=True)
    word = tl.where(word == 0x80000000, 0, word)
    return tl.where(word >= 0x80000000, 0xFFFFFFFF - word, word + 0x80000000)
