//! Rows of a table by number.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Storage};
use candle_core::{InplaceOp3, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::cpu::{values, values_mut, vectorized, with_element, zeros};
use super::plain;
#[cfg(feature = "cuda")]
use crate::cuda::ops as cuda;
use crate::element::{Element, check_dtype};
use crate::operand::Locked;
use crate::tape;

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

/// Tables that an [`embedding_sum`] takes at most; as `OP_MAX_TABLES` in `cuda/ops.h`.
pub const MAX_TABLES: usize = 4;

/// The sum of one row each of several tables, as the embeddings of a token add up: row i of the
/// result is the sum of the rows `ids[i]` of the tables.
///
/// `parts` are up to [`MAX_TABLES`] pairs of ids and table, as of [`embedding`]; the tables are f32
/// of one width, and there are as many ids for each.
///
/// # Errors
/// As [`embedding`], and when there is no part or too many, or they do not fit together.
pub fn embedding_sum(parts: &[(&Tensor, &Tensor)]) -> Result<Tensor> {
    let op = "embedding_sum";
    let Some((first_ids, first_table)) = parts.first().filter(|_| parts.len() <= MAX_TABLES) else {
        bail!(
            "{op}: got {} tables, expected 1 to {MAX_TABLES}",
            parts.len()
        )
    };
    for (ids, table) in parts {
        check(table, ids, [op, "id", "table"])?;
        let expected = [table.dim(0)?, first_table.dim(D::Minus1)?];
        super::check_dtype(op, "a table", table, DType::F32)?;
        super::check_shape(op, "a table", table, &expected, "the first one")?;
        super::check_shape(op, "ids", ids, first_ids.dims(), "the first ones")?;
    }
    let shape = (first_ids.elem_count(), first_table.dim(1)?);
    let parts = parts
        .iter()
        .map(|(ids, table)| Ok((ids.contiguous()?, table.contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    let tables: Vec<_> = parts.iter().map(|(_, table)| table).collect();
    let records = tape::records(&tables);
    if !records && tables.iter().any(|table| table.track_op()) {
        let mut rows = parts.iter().map(|(ids, table)| embedding(ids, table));
        let first = rows.next().unwrap_or_else(|| bail!("{op}: got no table"));
        return rows.try_fold(first?, |sum, row| sum + row?);
    }
    let y = sum_rows(&parts, shape)?;
    if !records {
        return Ok(plain(y, shape));
    }
    let y = tape::output(y, shape);
    tape::push(op, &y, move |grad, gradients| {
        let grad = grad.value.contiguous()?;
        for (ids, table) in parts.iter().filter(|(_, table)| table.track_op()) {
            let scatter = ScatterRows {
                count: table.dim(0)?,
            };
            let d_table = match gradients.remove_as(table, DType::F32)? {
                Some(before) => {
                    before.inplace_op3(&grad, ids, &scatter)?;
                    before
                }
                None => grad.apply_op2_no_bwd(ids, &scatter)?,
            };
            gradients.put(table, d_table.into());
        }
        Ok(())
    });
    Ok(y)
}

/// See [`embedding_sum`]; `parts` are contiguous.
fn sum_rows(parts: &[(Tensor, Tensor)], (len, width): (usize, usize)) -> Result<Storage> {
    let locked: Vec<_> = parts
        .iter()
        .map(|(ids, table)| (Locked::new(ids), Locked::new(table)))
        .collect();
    #[cfg(feature = "cuda")]
    if parts[0].1.device().is_cuda() {
        let parts = locked
            .iter()
            .map(|(ids, table)| Ok((ids.operand()?.cuda()?, table.operand()?.cuda()?)))
            .collect::<Result<Vec<_>>>()?;
        return cuda::sum_rows(&parts, len, width).map(Storage::Cuda);
    }
    let mut y = vec![0f32; len * width];
    for (ids, table) in &locked {
        let (table, layout) = table.operand()?.cpu()?;
        let (ids, ids_layout) = ids.operand()?.cpu()?;
        let ids = row_numbers(
            ids,
            ids_layout,
            layout.dims()[0],
            ["embedding_sum", "id", "table"],
        )?;
        let table = values::<f32>(table, layout)?;
        let rows = y.par_chunks_mut(width).zip(ids).with_min_len(64);
        rows.for_each(|(y, id)| {
            let row = &table[*id as usize * width..][..width];
            y.iter_mut().zip(row).for_each(|(y, x)| *y += x);
        });
    }
    Ok(Storage::Cpu(CpuStorage::F32(y)))
}

fn gather(table: &Tensor, rows: &Tensor, names: [&'static str; 3]) -> Result<Tensor> {
    check(table, rows, names)?;
    let op = GatherRows { names };
    tape::apply2(op, &table.contiguous()?, &rows.contiguous()?)
}

/// `names` are those of the operation, a row number and the table.
fn check(table: &Tensor, rows: &Tensor, [op, row, name]: [&str; 3]) -> Result<()> {
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
    Ok(())
}

/// Row numbers, all below `count`.
fn row_numbers<'a>(
    rows: &'a CpuStorage,
    layout: &Layout,
    count: usize,
    [op, row, name]: [&str; 3],
) -> Result<&'a [u32]> {
    let rows = values::<u32>(rows, layout)?;
    if let Some(at) = rows.iter().position(|row| *row as usize >= count) {
        bail!(
            "{op}: got {row} {} at position {at}, but {name} has {count} rows",
            rows[at]
        )
    }
    Ok(rows)
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
        let rows = row_numbers(rows, rows_layout, count, self.names)?;
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

/// Adds the rows of a gradient up at their numbers, in a new table of `count` rows, or in place in one
/// of f32.
struct ScatterRows {
    count: usize,
}

impl ScatterRows {
    fn scatter<T: Element>(grad: &[T], rows: &[u32], width: usize, table: &mut [T]) {
        let mut uses: Vec<usize> = (0..rows.len()).collect();
        uses.par_sort_unstable_by_key(|&i| (rows[i], i));

        let (mut rest, mut first) = (table, 0);
        let mut sums = Vec::new();
        for uses in uses.chunk_by(|&i, &j| rows[i] == rows[j]) {
            let row = rows[uses[0]] as usize;
            let (sum, after) = rest[(row - first) * width..].split_at_mut(width);
            sums.push((sum, uses));
            (rest, first) = (after, row + 1);
        }
        sums.into_par_iter().for_each(|(sum, uses)| {
            let mut total: Vec<f32> = sum.iter().map(|x| x.to_f32()).collect();
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
            let mut table = zeros(self.count * width);
            Self::scatter::<T>(values(grad, grad_layout)?, rows, width, &mut table);
            T::to_cpu_storage_owned(table)
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

impl InplaceOp3 for ScatterRows {
    fn name(&self) -> &'static str {
        "scatter_rows"
    }

    fn cpu_fwd(
        &self,
        table: &mut CpuStorage,
        table_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> Result<()> {
        let (_, width) = grad_layout.shape().dims2()?;
        let (grad, rows) = (values(grad, grad_layout)?, values(rows, rows_layout)?);
        Self::scatter::<f32>(grad, rows, width, values_mut(table, table_layout)?);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        table: &mut CudaStorage,
        table_layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
        rows: &CudaStorage,
        rows_layout: &Layout,
    ) -> Result<()> {
        let (grad, rows) = ((grad, grad_layout), (rows, rows_layout));
        cuda::add_rows(grad, rows, (table, table_layout))
    }
}
