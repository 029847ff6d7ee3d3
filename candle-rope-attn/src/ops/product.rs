//! Matrix products, with what a dense layer adds to them.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;

use crate::operand::{Locked, Operand};

/// A matrix of contiguous rows `[.., columns]`, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub operand: Operand<'a>,
    pub transposed: bool,
}

impl Matrix<'_> {
    /// Rows and columns, of the transpose if it is one.
    pub fn dims(&self) -> [usize; 2] {
        let (rows, columns) = rows_and_columns(self.operand.layout().dims());
        match self.transposed {
            false => [rows, columns],
            true => [columns, rows],
        }
    }
}

/// All axes but the last are rows.
pub(crate) fn rows_and_columns(dims: &[usize]) -> (usize, usize) {
    match dims {
        [rows @ .., columns] => (rows.iter().product(), *columns),
        [] => (1, 1),
    }
}

/// `scale * left right + bias + add`, products summed in f32 and rounded to `dtype` at the end.
pub(crate) struct Product<'a> {
    pub scale: f32,
    pub left: Matrix<'a>,
    pub right: Matrix<'a>,
    /// A row `[columns]`, in the dtype of the result.
    pub bias: Option<Operand<'a>>,
    /// In the shape and dtype of the result.
    pub add: Option<Operand<'a>>,
    pub dtype: DType,
}

impl Product<'_> {
    /// `[rows, inner, columns]`.
    pub fn sizes(&self) -> [usize; 3] {
        let [rows, inner] = self.left.dims();
        [rows, inner, self.right.dims()[1]]
    }

    pub fn compute(&self) -> Result<Storage> {
        let [rows, inner, columns] = self.sizes();
        let addends = [(self.add, rows * columns), (self.bias, columns)];
        let fits = |(operand, elements): (Option<Operand>, usize)| {
            operand.is_none_or(|x| {
                x.dtype() == self.dtype && x.layout().shape().elem_count() == elements
            })
        };
        if inner != self.right.dims()[0] || !addends.into_iter().all(fits) {
            bail!("product: the operands of a {rows}x{inner}x{columns} product do not fit")
        }
        match self.left.operand {
            Operand::Cpu(..) => self.cpu().map(|y| Storage::Cpu(CpuStorage::F32(y))),
            #[cfg(feature = "cuda")]
            Operand::Cuda(..) => crate::cuda::product::product(self).map(Storage::Cuda),
            #[cfg(not(feature = "cuda"))]
            Operand::Cuda(..) => bail!("this program was built without CUDA"),
        }
    }

    fn cpu(&self) -> Result<Vec<f32>> {
        if self.dtype != DType::F32 {
            bail!("product on a CPU: got dtype {:?}, expected F32", self.dtype)
        }
        let [rows, inner, columns] = self.sizes();
        let mut y = match self.add {
            Some(add) => add.values::<f32>()?.to_vec(),
            None => vec![0.0; rows * columns],
        };
        if let Some(bias) = self.bias {
            let bias = bias.values::<f32>()?;
            y.par_chunks_mut(columns.max(1))
                .with_min_len(128)
                .for_each(|row| row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
        }
        let left = self.left.operand.values::<f32>()?;
        let right = self.right.operand.values::<f32>()?;
        if [left.len(), right.len(), y.len()] != [rows * inner, inner * columns, rows * columns] {
            bail!("product: the matrices do not fit: {:?}", self.sizes())
        }
        let strides = |matrix: &Matrix, [rows, columns]: [usize; 2]| match matrix.transposed {
            false => (1, columns as isize),
            true => (rows as isize, 1),
        };
        let (left_column, left_row) = strides(&self.left, [rows, inner]);
        let (right_column, right_row) = strides(&self.right, [inner, columns]);
        // SAFETY: the strides are those of contiguous row-major matrices, or their transposes, of
        // the lengths just checked.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                inner,
                y.as_mut_ptr(),
                1,
                columns as isize,
                self.add.is_some() || self.bias.is_some(),
                left.as_ptr(),
                left_column,
                left_row,
                right.as_ptr(),
                right_column,
                right_row,
                1.0,
                self.scale,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
        Ok(y)
    }
}

/// `left right + add` of contiguous tensors, in `dtype`.
pub(super) fn product(
    matrices: [&Tensor; 2],
    transposed: [bool; 2],
    add: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    scaled_product(1.0, matrices, transposed, add, dtype)
}

/// `scale * left right + add` of contiguous tensors, in `dtype`.
pub(super) fn scaled_product(
    scale: f32,
    [left, right]: [&Tensor; 2],
    transposed: [bool; 2],
    add: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    let inner = if transposed[0] { 0 } else { 1 };
    if left.dim(inner)? == 0 {
        let shape = (
            left.dim(1 - inner)?,
            right.dim(usize::from(!transposed[1]))?,
        );
        return add.map_or_else(
            || Tensor::zeros(shape, dtype, left.device()),
            |add| Ok(add.clone()),
        );
    }
    let locked = (Locked::new(left), Locked::new(right), add.map(Locked::new));
    let product = Product {
        scale,
        left: Matrix {
            operand: locked.0.operand()?,
            transposed: transposed[0],
        },
        right: Matrix {
            operand: locked.1.operand()?,
            transposed: transposed[1],
        },
        bias: None,
        add: locked.2.as_ref().map(Locked::operand).transpose()?,
        dtype,
    };
    let [rows, _, columns] = product.sizes();
    Ok(super::plain(product.compute()?, (rows, columns)))
}
