//! What the CPU implementations share: element types, vectorised loops, fixed work splits.
//!
//! Work is split by size alone, never by the number of threads, and partial sums are added in
//! order, so results are the same bits on any number of threads.

use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use rayon::prelude::*;

use crate::element::Element;

/// Elements that one task of an elementwise loop takes.
pub(crate) const CHUNK: usize = 1 << 14;

/// Evaluates an expression with `$T` as the element type of `$dtype`, which the operation has
/// checked by [`crate::element::check_dtype`].
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// The values of a contiguous tensor.
pub(crate) fn values<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!(
            "got strides {:?} for shape {:?}, expected a contiguous tensor",
            layout.stride(),
            layout.dims()
        )
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// The values of a contiguous f32 tensor, to be changed.
pub(crate) fn values_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("got a tensor of another dtype or with gaps, expected contiguous f32"),
    }
}

/// Room for a result.
pub(crate) fn zeros<T: WithDType>(len: usize) -> Vec<T> {
    vec![T::zero(); len]
}

/// Runs a loop compiled for the vector instructions of this machine. Only what inlines into it is.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// `f(x)` of every element.
pub(crate) fn map<T: Element>(x: &[T], f: impl Fn(f32) -> f32 + Sync) -> Vec<T> {
    let mut y = zeros(x.len());
    y.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.iter_mut().zip(x) {
                        *y = T::from_f32(f(x.to_f32()));
                    }
                },
            )
        });
    y
}

/// `f(a, b)` of every pair of elements.
pub(crate) fn map2<T: Element>(a: &[T], b: &[T], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<T> {
    let mut y = zeros(a.len());
    let pairs = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    y.par_chunks_mut(CHUNK).zip(pairs).for_each(|(y, (a, b))| {
        vectorized(
            #[inline(always)]
            || {
                for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                    *y = T::from_f32(f(a.to_f32(), b.to_f32()));
                }
            },
        )
    });
    y
}

/// Both numbers of `f(a, b)` of every pair of elements.
pub(crate) fn map2_to_2<T: Element>(
    a: &[T],
    b: &[T],
    f: impl Fn(f32, f32) -> (f32, f32) + Sync,
) -> (Vec<T>, Vec<T>) {
    let (mut y, mut z) = (zeros(a.len()), zeros(a.len()));
    let pairs = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    (y.par_chunks_mut(CHUNK)
        .zip(z.par_chunks_mut(CHUNK))
        .zip(pairs))
    .for_each(|((y, z), (a, b))| {
        vectorized(
            #[inline(always)]
            || {
                for (((y, z), a), b) in y.iter_mut().zip(z).zip(a).zip(b) {
                    let (first, second) = f(a.to_f32(), b.to_f32());
                    (*y, *z) = (T::from_f32(first), T::from_f32(second));
                }
            },
        )
    });
    (y, z)
}

/// Folds the pairs of `a` and `b` by `f` in lanes, which `combine` joins: vectorisable, and in the
/// same order on every machine.
#[inline(always)]
fn reduce2<A: Copy, B: Copy>(
    a: &[A],
    b: &[B],
    init: f32,
    f: impl Fn(f32, A, B) -> f32,
    combine: impl Fn(f32, f32) -> f32,
) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [init; LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a).zip(&mut b) {
        for i in 0..LANES {
            lanes[i] = f(lanes[i], a[i], b[i]);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a.remainder()).zip(b.remainder()) {
        *lane = f(*lane, *a, *b);
    }
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = combine(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

/// Sum of `f(x)` over the elements.
#[inline(always)]
pub(crate) fn sum<T: Copy>(x: &[T], f: impl Fn(T) -> f32) -> f32 {
    reduce2(x, x, 0.0, |sum, x, _| sum + f(x), |a, b| a + b)
}

/// Sum of `f(a, b)` over the pairs of elements.
#[inline(always)]
pub(crate) fn sum2<A: Copy, B: Copy>(a: &[A], b: &[B], f: impl Fn(A, B) -> f32) -> f32 {
    reduce2(a, b, 0.0, |sum, a, b| sum + f(a, b), |a, b| a + b)
}

/// The largest element that is no NaN, minus infinity if there is none.
#[inline(always)]
pub(crate) fn max<T: Element>(x: &[T]) -> f32 {
    let larger = |a, b| if b > a { b } else { a };
    reduce2(
        x,
        x,
        f32::NEG_INFINITY,
        |max, x, _| larger(max, x.to_f32()),
        larger,
    )
}

/// Adds `parts` in order.
pub(crate) fn sum_vectors(len: usize, parts: &[Vec<f32>]) -> Vec<f32> {
    let mut total = vec![0.0; len];
    for part in parts {
        total
            .iter_mut()
            .zip(part)
            .for_each(|(total, x)| *total += x);
    }
    total
}

/// `e^x` to 2 ulp; 0 below the normal numbers. Without a branch or a call, so that loops vectorise.
///
/// Polynomial of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MIN: f32 = -87.336_54;
    const MAX: f32 = 88.722_84;
    // Adding it rounds to an integer, which then is in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that NaN stays NaN.
    let clamped = if x < MIN { MIN } else { x };
    let clamped = if clamped > MAX { MAX } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * r + c;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    // 2^n in two factors: n = 128 alone has no f32.
    let half = exponent >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let y = (p * r * r + r + 1.0) * power(half) * power(exponent.wrapping_sub(half));
    if x < MIN { 0.0 } else { y }
}
