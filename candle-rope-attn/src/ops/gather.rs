//! Rows of a table by number.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::cpu::{values, vectorized, with_element, zeros};
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::{Element, check_dtype};

/// Rows of an embedding table: row `ids[i]` of the table is row i of the result.
///
/// ids are u32 `[n]`, the table is `[rows, width]` in f32, bf16 or f16, and the result is
/// `[n, width]` in the table's dtype. The gradient of a row is summed in f32 over its uses, in
/// their order.
///
/// # Errors
/// When a dtype or shape is another, or an id is not below `rows`. On a GPU, where that would have
/// to be waited for, such an id gives a row of NaN instead.
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    gather(table, ids, ["embedding", "id", "table"])
}

/// Rows of x by number: row `rows[i]` of x is row i of the result. As [`embedding`], which names
/// its arguments differently in errors.
///
/// # Errors
/// As [`embedding`].
pub fn gather_rows(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    gather(x, rows, ["gather_rows", "row", "x"])
}

fn gather(table: &Tensor, rows: &Tensor, names: [&'static str; 3]) -> Result<Tensor> {
    let [op, row, name] = names;
    check_dtype(op, table.dtype())?;
    super::check_dtype(op, &format!("{row}s"), rows, DType::U32)?;
    if table.rank() != 2 || table.dims()[1] == 0 {
        bail!(
            "{op}: got {name} of shape {:?}, expected [rows, width]",
            table.dims()
        )
    }
    if rows.rank() != 1 {
        bail!(
            "{op}: got {row}s of shape {:?}, expected one axis; flatten them",
            rows.dims()
        )
    }
    table
        .contiguous()?
        .apply_op2(&rows.contiguous()?, GatherRows { names })
}

struct GatherRows {
    /// Of the operation, a row number and the table, for errors.
    names: [&'static str; 3],
}

impl CustomOp2 for GatherRows {
    fn name(&self) -> &'static str {
        self.names[0]
    }

    fn cpu_fwd(
        &self,
        table: &CpuStorage,
        table_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (count, width) = table_layout.shape().dims2()?;
        let rows = values::<u32>(rows, rows_layout)?;
        if let Some(at) = rows.iter().position(|row| *row as usize >= count) {
            let [op, row, name] = self.names;
            bail!(
                "{op}: got {row} {} at position {at}, but {name} has {count} rows",
                rows[at]
            )
        }
        let y = with_element!(table.dtype(), T => {
            let table = values::<T>(table, table_layout)?;
            let mut y = zeros(rows.len() * width);
            y.par_chunks_mut(width).zip(rows).with_min_len(64).for_each(|(y, row)| {
                y.copy_from_slice(&table[*row as usize * width..][..width]);
            });
            T::to_cpu_storage_owned(y)
        });
        Ok((y, (rows.len(), width).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        table: &CudaStorage,
        table_layout: &Layout,
        rows: &CudaStorage,
        rows_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::gather_rows((table, table_layout), (rows, rows_layout))
    }

    fn bwd(
        &self,
        table: &Tensor,
        rows: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let scatter = ScatterRows {
            count: table.dim(0)?,
        };
        let d_table = grad.contiguous()?.apply_op2_no_bwd(rows, &scatter)?;
        Ok((Some(d_table), None))
    }
}

/// Adds the rows of a gradient up at their numbers, in a table of `count` rows.
struct ScatterRows {
    count: usize,
}

impl ScatterRows {
    fn scatter<T: Element>(&self, grad: &[T], rows: &[u32], width: usize) -> Vec<T> {
        let mut uses: Vec<usize> = (0..rows.len()).collect();
        uses.par_sort_unstable_by_key(|&i| (rows[i], i));

        let mut table = zeros(self.count * width);
        let (mut rest, mut first) = (&mut table[..], 0);
        let mut sums = Vec::new();
        for uses in uses.chunk_by(|&i, &j| rows[i] == rows[j]) {
            let row = rows[uses[0]] as usize;
            let (sum, after) = rest[(row - first) * width..].split_at_mut(width);
            sums.push((sum, uses));
            (rest, first) = (after, row + 1);
        }
        sums.into_par_iter().for_each(|(sum, uses)| {
            let mut total = vec![0.0; width];
            for &i in uses {
                vectorized(
                    #[inline(always)]
                    || {
                        for (total, grad) in total.iter_mut().zip(&grad[i * width..]) {
                            *total += grad.to_f32();
                        }
                    },
                );
            }
            T::store(&total, sum);
        });
        table
    }
}

impl CustomOp2 for ScatterRows {
    fn name(&self) -> &'static str {
        "scatter_rows"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = grad_layout.shape().dims2()?;
        let rows = values::<u32>(rows, rows_layout)?;
        let table = with_element!(grad.dtype(), T => {
            T::to_cpu_storage_owned(self.scatter::<T>(values(grad, grad_layout)?, rows, width))
        });
        Ok((table, (self.count, width).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        grad: &CudaStorage,
        grad_layout: &Layout,
        rows: &CudaStorage,
        rows_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::scatter_rows((grad, grad_layout), (rows, rows_layout), self.count)
    }
}
